"""`wrap`: models that accelerate spreads over devices and the disk, compiled ones, copies, other activations."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaForCausalLM

from mamba_ioi import Patch, cache, load_model, run
from mamba_ioi.circuits import eap
from mamba_ioi.models.model import wrap
from mamba_ioi.tasks.ioi import IOIDataset

from .conftest import random_mamba

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PATCHES = [
    Patch("h", 1, 0.5, [2]),
    Patch("conv", 2, 0.1, [3]),
    Patch("conv_slice", 1, 0.0, [1], slice=-1),
    Patch("resid_post", 0, 0.3, [4]),
]
SITES = ["embed", "resid_post", "conv_slice", "conv", "A", "delta", "h", "after_skip", "out_proj", "norm", "logits"]


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes)).eval()


class Offload:
    """What accelerate's AlignDevicesHook does for a module whose weights are away while it does not run."""

    no_grad = False

    def __init__(self, module: nn.Module) -> None:
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        self.weights_map = {name: parameter.detach().clone() for name, parameter in own.items()}
        self.post_forward(module, None)

    def pre_forward(self, module, *args, **kwargs):
        for name, weight in self.weights_map.items():
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        return args, kwargs

    def post_forward(self, module, output):
        for name, weight in self.weights_map.items():
            module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
        return output


def offloaded(module: nn.Module, places: dict[str, str] | None, only: str = ""):
    """The module as `from_pretrained(device_map=…)` leaves it, the parts whose names hold ``only`` off the device."""

    def forward(part, *args, **kwargs):
        args, kwargs = part._hf_hook.pre_forward(part, *args, **kwargs)
        return part._hf_hook.post_forward(part, part._old_forward(*args, **kwargs))

    for name, part in module.named_modules():
        if only in name and any(parameter is not None for parameter in part._parameters.values()):
            part._old_forward = part.forward
            part._hf_hook = Offload(part)
            part.forward = functools.update_wrapper(functools.partial(forward, part), part._old_forward)
    if places is not None:
        module.hf_device_map = places
    return module


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestOffloaded:
    """Everything is as on the model that lies in memory."""

    @pytest.mark.parametrize(
        ("places", "only"),
        [
            ({"backbone.embeddings": "cpu", "backbone.layers.1": "disk", "lm_head": "cpu"}, "layers.1"),
            ({"backbone.embeddings": "disk", "lm_head": "disk", "backbone.layers": "cpu"}, "e"),
            ({"": "disk"}, ""),
            ({"": "cpu"}, "nothing"),
            (None, ""),
        ],
    )
    def test_values(self, small, places, only):
        module = offloaded(random_mamba(), places, only)
        model = wrap(module, None, model_id="offloaded")
        with torch.no_grad(), model.trace(IDS):
            out = model.lm_head.output.save()
        close(out, small._module(IDS, use_cache=False).logits)
        close(run(model, IDS), run(small, IDS))
        close(run(model, IDS, PATCHES), run(small, IDS, PATCHES))
        assert not torch.allclose(run(model, IDS, PATCHES), run(model, IDS), atol=1e-2)
        found, expected = cache(model, IDS, SITES), cache(small, IDS, SITES)
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
        assert model.device == torch.device("cpu") and model.dtype == torch.float32
        assert getattr(module, "hf_device_map", None) == places
        with model.generate(IDS, max_new_tokens=3, do_sample=False) as tracer:
            tokens = tracer.result.save()
        assert torch.equal(tokens, small._module.generate(IDS, max_new_tokens=3, do_sample=False))

    def test_gradients_and_texts(self):
        tiny = load_model("tiny")
        module = offloaded(MambaForCausalLM(tiny._module.config).eval(), None, "nothing")
        module.load_state_dict(tiny._module.state_dict())
        model = wrap(offloaded(module, {"": "disk"}), tiny.tokenizer, model_id="offloaded")
        data = IOIDataset.generate(tiny.tokenizer, 2, symmetric=False)
        found, expected = (eap(one, data, steps=2).table.score for one in (model, tiny))
        close(torch.tensor(found), torch.tensor(expected))
        close(run(model, data.clean_text), run(tiny, data.clean_text))

    def test_another_language_model(self):
        model = wrap(offloaded(small_gpt2(), {"": "disk"}), None, model_id="offloaded")
        with torch.no_grad(), model.trace(IDS):
            out = model.lm_head.output.save()
        close(out, small_gpt2()(IDS).logits)


def compiled(at: str):
    """A model of which one part, or its forward alone, is compiled."""
    module = random_mamba()
    if at == "whole":
        return torch.compile(module)
    if at == "in place":
        module.compile()
    elif at == "layer":
        module.backbone.layers[1] = torch.compile(module.backbone.layers[1])
    elif at == "mixer in place":
        module.backbone.layers[1].mixer.compile()
    elif at == "forward":
        module.forward = torch.compile(module.forward)
    return module


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("at", "part"),
        [
            ("whole", "the model"),
            ("in place", "the model"),
            ("forward", "the model"),
            ("layer", r"its backbone\.layers\.1"),
            ("mixer in place", r"its backbone\.layers\.1\.mixer"),
        ],
    )
    def test_compiled_models(self, at, part):
        with pytest.raises(ValueError, match=rf"^{part} is compiled by torch\.compile.*wrap the uncompiled model$"):
            wrap(compiled(at), None, model_id="compiled")

    @pytest.mark.untyped
    def test_what_is_no_language_model_with_weights(self, small):
        for wrong, words in (
            (None, "not a NoneType"),
            ("tiny", "not a str"),
            (small, "not a MambaModel"),
            (random_mamba().backbone, "not a MambaModel"),
            (nn.DataParallel(random_mamba()), "not a DataParallel"),
            (random_mamba().to("meta"), "the model has no weights: those of its backbone.embeddings are on 'meta'"),
        ):
            with pytest.raises(ValueError, match=words):
                wrap(wrong, None, model_id="wrong")

    @pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "gelu_new"])
    def test_other_activations(self, tmp_path, activation):
        module = random_mamba(hidden_act=activation)
        with pytest.raises(ValueError, match=rf"activation is '{activation}' \(hidden_act\)"):
            wrap(module, None, model_id="other")
        module.save_pretrained(tmp_path)
        for remote in (False, True):
            with pytest.raises(ValueError, match=rf"activation is '{activation}'"):
                load_model(tmp_path, remote=remote)

    def test_silu_by_its_other_name(self, small):
        model = wrap(random_mamba(hidden_act="swish"), None, model_id="swish")
        assert torch.equal(run(model, IDS, PATCHES), run(small, IDS, PATCHES))


class TestCopies:
    """A copy gives the same values, has weights of its own, and its sites work."""

    @pytest.mark.parametrize("name", ["random", "tiny", "planted", "offloaded"])
    def test_deep_copies(self, name):
        if name == "random":
            model = wrap(random_mamba(), None, model_id="random")
        elif name == "offloaded":
            model = wrap(offloaded(random_mamba(), {"": "disk"}), None, model_id="offloaded")
        else:
            model = load_model(name)
        model.memory = 10**9
        other = copy.deepcopy(model)
        before, patched = run(model, IDS), run(model, IDS, PATCHES)
        assert type(other) is type(model) and other.model_id == name and other.memory == 10**9
        assert torch.equal(run(other, IDS), before) and torch.equal(run(other, IDS, PATCHES), patched)
        assert (other.tokenizer is None) == (model.tokenizer is None)
        found = []
        for one in (model, other):
            with torch.no_grad(), one.trace(IDS):
                one.layers[1].mixer.conv[:, 2] = 1
                h = one.layers[1].mixer.scan({3: torch.zeros(())}).save()
                out = one.lm_head.output.save()
            found.append((h, out))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        assert (found[0][0][:, 3] == 0).all()
        if name == "planted":
            assert other.planted == model.planted
        if name != "offloaded":
            with torch.no_grad():
                other._module.lm_head.weight.mul_(2)
                tied = model._module.lm_head.weight is model._module.backbone.embeddings.weight
            assert tied == (other._module.lm_head.weight is other._module.backbone.embeddings.weight)
            assert not torch.allclose(run(other, IDS), before, atol=1e-3)
        assert torch.equal(run(model, IDS), before) and torch.equal(run(model, IDS, PATCHES), patched)

    def test_inside_other_objects(self, small):
        held = copy.deepcopy({"one": small, "two": [small]})
        assert held["one"] is held["two"][0] and held["one"] is not small
        assert torch.equal(run(held["one"], IDS), run(small, IDS))

    def test_another_language_model(self):
        model = wrap(small_gpt2(), None, model_id="gpt2")
        other = copy.deepcopy(model)
        with torch.no_grad():
            other._module.transformer.h[0].attn.c_proj.weight.mul_(30)
            with model.trace(IDS):
                kept = model.lm_head.output.save()
            with other.trace(IDS):
                changed = other.lm_head.output.save()
        assert torch.equal(kept, small_gpt2()(IDS).logits) and torch.equal(changed, other._module(IDS).logits)
        assert not torch.allclose(kept, changed, atol=1e-3)

    def test_a_remote_model(self):
        other = copy.deepcopy(load_model("tiny", remote="http://127.0.0.1:1"))
        assert other.remote.target == "http://127.0.0.1:1" and next(other._module.parameters()).is_meta

    def test_edits(self):
        model = wrap(random_mamba(), None, model_id="random")
        with model.edit(inplace=True):
            model.layers[0].resid_post[:] = 0
        with pytest.raises(ValueError, match="a model with edits has no copy: call its clear_edits"):
            copy.deepcopy(model)
        model.clear_edits()
        assert torch.equal(run(copy.deepcopy(model), IDS), run(model, IDS))

    def test_pickles(self, small):
        for write in (pickle.dumps, lambda model: torch.save(model, io.BytesIO()), lambda model: pickle.dumps([model])):
            with pytest.raises(ValueError, match=r"^a model is not pickled: save its weights by .*save_pretrained"):
                write(small)

    def test_what_the_refusal_of_pickles_says(self, tmp_path):
        """The way that it names gives the same model."""
        tiny = load_model("tiny")
        tiny._module.save_pretrained(tmp_path)
        tiny.tokenizer.save_pretrained(tmp_path)
        again = load_model(tmp_path)
        assert torch.equal(run(again, "Then, Mary and John"), run(tiny, "Then, Mary and John"))
