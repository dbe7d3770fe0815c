"""`load_model`: what it loads, that the weights are the ones on disk, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import mamba_ioi.trace.stages
from mamba_ioi import Patch, cache, load_model, run
from mamba_ioi.models.model import CausalLM, MambaModel, check_slow_path, wrap
from mamba_ioi.tasks.names import NAMES
from mamba_ioi.trace.sites import SITES

from .conftest import random_mamba
from .plain import prompt_tokenizer

PROMPT = "Then, Mary and John went to the store. John gave a drink to"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with a small random Mamba and a tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("saved")
    random_mamba(vocab_size=600).save_pretrained(folder)
    prompt_tokenizer(list(NAMES[:40])).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A function that copies `saved`, changing its config or its weights."""

    def make(edit=None, **config) -> Path:
        for path in saved.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        settings = json.loads((tmp_path / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if edit is not None:
            weights = load_file(tmp_path / "model.safetensors")
            edit(weights)
            save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def logits(model, ids):
    with torch.no_grad():
        return model._module(ids, use_cache=False).logits


def refused(name, words, **options):
    """Assert that a load fails with one sentence that holds these words."""
    with pytest.raises(ValueError, match=words) as error:
        load_model(name, **options)
    assert "\n" not in str(error.value)


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


class TestPackaged:
    """`tiny` and `planted`."""

    @pytest.mark.parametrize("name", ["tiny", "planted"])
    def test_answers_the_prompt(self, name):
        from mamba_ioi import IOIDataset

        model = load_model(name)
        data = IOIDataset.generate(model.tokenizer, 8, seed=3)
        for text, answer, last in zip(data.clean_text, data.answers.tolist(), data.last_position.tolist(), strict=True):
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][: last + 1]
            assert run(model, torch.tensor([ids])).argmax().item() == answer

    def test_tiny(self):
        model = load_model("tiny")
        names = [model.tokenizer.decode(run(model, PROMPT).argmax())]
        assert names == [" Mary"]
        assert model.model_id == "tiny" and isinstance(model, MambaModel)
        assert model.dtype == torch.float32 and model.device == torch.device("cpu") and not model._module.training


class TestDirectory:
    """A directory that transformers saved."""

    def test_weights_and_sizes(self, saved):
        model, module = load_model(saved), random_mamba(vocab_size=600)
        assert torch.equal(logits(model, IDS), module(IDS, use_cache=False).logits)
        sizes = {"D": 12, "E": 24, "N": 4, "R": 3, "K": 4, "V": 600}
        assert model.sizes() == sizes and model.n_layers == len(model.layers) == 3
        assert [model.d_model, model.d_inner, model.d_state, model.dt_rank, model.d_conv] == list(sizes.values())[:5]
        assert model.model_id == str(saved)
        assert run(model, "Then, Aaron").shape == (1, 600)

    def test_names_of_paths(self, saved, monkeypatch):
        monkeypatch.chdir(saved.parent)
        monkeypatch.setenv("HOME", str(saved.parent))
        for name in (str(saved), f"{saved}/", f"./{saved.name}", saved.name, f"~/{saved.name}"):
            assert load_model(name).n_layers == 3

    def test_without_a_tokenizer(self, copy):
        folder = copy()
        for path in folder.glob("*token*"):
            path.unlink()
        model = load_model(folder)
        assert model.tokenizer is None
        assert run(model, IDS).shape == (2, 600)
        with pytest.raises(ValueError, match="no tokenizer"):
            run(model, "Then")

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", torch.bfloat16])
    def test_dtypes(self, saved, dtype):
        model = load_model(saved, dtype=dtype)
        assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        assert run(model, IDS).isfinite().all()

    def test_the_checkpoints_own_dtype(self, tmp_path):
        random_mamba(dtype=torch.bfloat16).save_pretrained(tmp_path)
        assert load_model(tmp_path).dtype == torch.bfloat16
        assert load_model(tmp_path, dtype="float32").dtype == torch.float32

    @pytest.mark.untyped
    @pytest.mark.parametrize("dtype", ["int8", "floaty", "Tensor", torch.int64, 32, "float8_e4m3fn", "torch.float32"])
    def test_bad_dtypes(self, saved, dtype):
        refused(saved, "is not one of float32", dtype=dtype)

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_devices(self, saved, device):
        assert load_model(saved, device=device).device == torch.device("cpu")

    @pytest.mark.untyped
    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "meta", 3.5])
    def test_bad_devices(self, saved, device):
        refused(saved, "device", device=device)

    def test_a_deep_model_in_low_precision(self):
        """Its logits are far from float32's by rounding alone, in transformers as here: no reason to refuse it."""
        model = wrap(random_mamba(dtype=torch.bfloat16, num_hidden_layers=48, hidden_size=64), None, model_id="deep")
        assert check_slow_path(model) < 5e-2


def original(module, folder, file="pytorch_model.bin", padded=True, tied=True, dtype=torch.float32, **config):
    """Save a Mamba in the layout of the state-spaces repositories."""
    weights = {key.replace("embeddings", "embedding"): value.clone() for key, value in module.state_dict().items()}
    if tied is None:
        del weights["lm_head.weight"]
    weights = {key: value.to(dtype) for key, value in weights.items()}
    vocab = weights["backbone.embedding.weight"].shape[0]
    settings = {"d_model": 12, "n_layer": 3, "vocab_size": vocab - 3 if padded else vocab, "ssm_cfg": {}}
    settings |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(settings | config))
    if file.endswith("bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file)
    return weights


class TestOriginalLayout:
    """The layout of state-spaces/mamba-130m."""

    @pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
    @pytest.mark.parametrize("padded", [True, False])
    @pytest.mark.parametrize("tied", [True, None])
    def test_tied(self, tmp_path, file, padded, tied):
        module = random_mamba(vocab_size=64)
        original(module, tmp_path, file, padded, tied)
        model = load_model(tmp_path)
        assert model.vocab_size == 64 and model.tokenizer is None
        assert torch.equal(logits(model, IDS), module(IDS, use_cache=False).logits)

    @pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
    def test_untied(self, tmp_path, file):
        module = random_mamba(vocab_size=64, tie_word_embeddings=False)
        assert not torch.equal(module.lm_head.weight, module.backbone.embeddings.weight)
        original(module, tmp_path, file, tie_embeddings=False)
        assert torch.equal(logits(load_model(tmp_path), IDS), module(IDS, use_cache=False).logits)

    def test_other_sizes(self, tmp_path):
        module = random_mamba(vocab_size=64, expand=3, intermediate_size=36, conv_kernel=3, state_size=5)
        original(module, tmp_path)
        model = load_model(tmp_path)
        assert (model.d_inner, model.d_conv, model.d_state) == (36, 3, 5)
        assert torch.equal(logits(model, IDS), module(IDS, use_cache=False).logits)

    def test_half_precision(self, tmp_path):
        original(random_mamba(), tmp_path, dtype=torch.bfloat16)
        assert load_model(tmp_path).dtype == torch.bfloat16
        assert load_model(tmp_path, dtype="float32").dtype == torch.float32

    def test_code_in_a_pickle_is_not_executed(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        original(random_mamba(), tmp_path)
        with open(tmp_path / "pytorch_model.bin", "wb") as file:
            pickle.dump({"backbone.embedding.weight": Harm()}, file, protocol=2)
        refused(tmp_path, "could not be loaded")
        torch.save({"backbone.embedding.weight": Harm()}, tmp_path / "pytorch_model.bin")
        refused(tmp_path, "could not be loaded")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"n_layer": 2}, "backbone.layers.2|size|loading state_dict"),
            ({"n_layer": 4}, "could not be loaded"),
            ({"d_model": 16}, "could not be loaded"),
            ({"ssm_cfg": {"layer": "Mamba2"}}, "only Mamba1"),
            ({"attn_layer_idx": [1]}, "only Mamba1"),
        ],
    )
    def test_configs_that_do_not_fit(self, tmp_path, config, words):
        original(random_mamba(), tmp_path, **config)
        refused(tmp_path, words)

    def test_an_untied_model_without_its_unembedding(self, tmp_path):
        original(random_mamba(), tmp_path, tied=None, tie_embeddings=False)
        refused(tmp_path, "could not be loaded")

    @pytest.mark.parametrize("key", ["backbone.embedding.weight", "backbone.layers.0.mixer.A_log"])
    def test_missing_weights(self, tmp_path, key):
        weights = original(random_mamba(), tmp_path)
        del weights[key]
        torch.save(weights, tmp_path / "pytorch_model.bin")
        refused(tmp_path, f"lack {key}")

    def test_no_weights(self, tmp_path):
        original(random_mamba(), tmp_path)
        (tmp_path / "pytorch_model.bin").unlink()
        refused(tmp_path, "neither model.safetensors nor pytorch_model.bin")


class TestOtherLanguageModels:
    """GPT-2 and Llama, which load without Mamba sites."""

    @pytest.fixture(params=["gpt2", "llama"])
    def other(self, request, tmp_path):
        if request.param == "gpt2":
            config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
            module = GPT2LMHeadModel(config).eval()
        else:
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
            module = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        module.save_pretrained(tmp_path)
        return load_model(tmp_path), module

    def test_loading_and_tracing(self, other):
        model, module = other
        assert type(model) is CausalLM and not model.is_mamba
        assert (model.n_layers, model.d_model, model.vocab_size, len(model.layers)) == (2, 16, 50, 2)
        with torch.no_grad():
            expected = module(IDS).logits
            with model.trace(IDS):
                hidden = model.layers[1].output.save()
                out = model.lm_head.output.save()
        assert torch.equal(out, expected)
        assert (hidden if isinstance(hidden, torch.Tensor) else hidden[0]).shape == (2, 7, 16)

    def test_sites_need_a_mamba(self, other):
        model, _ = other
        for act in (
            lambda: run(model, IDS, [Patch("conv", 0, 0.0)]),
            lambda: cache(model, IDS, ["conv"]),
            lambda: cache(model, IDS, [("h", 1)]),
        ):
            with pytest.raises(ValueError, match=r"need a Mamba; .* is a (GPT2LMHeadModel|LlamaForCausalLM)") as error:
                act()
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("cls", [BertForMaskedLM, BertModel])
    def test_bert(self, tmp_path, cls):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        cls(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
        refused(tmp_path, f"it is a {cls.__name__}")


class TestWhatIsRefused:
    """Nothing is loaded that is not on the disk as its config says."""

    @pytest.mark.untyped
    def test_places(self, tmp_path, saved):
        refused(tmp_path / "absent", "there is no directory")
        refused("./absent", "there is no directory")
        refused("", "there is no directory")
        refused(saved / "config.json", "is a file")
        refused(tmp_path, "no config.json")
        refused(tmp_path, "no config.json", remote=True)
        for name in (5, None, b"tiny"):
            refused(name, "named by a text or a path")

    def test_an_unknown_hub_id_without_a_network(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        start = time.monotonic()
        for remote in (False, True):
            refused("nobody/no-such-model", "nor a Hub id that can be reached", remote=remote)
        assert time.monotonic() - start < 5

    @pytest.mark.parametrize("text", ['{"a": ', "[]", "{}", '{"model_type": "no_such_model"}', "\x00", ""])
    def test_configs(self, copy, text):
        folder = copy()
        (folder / "config.json").write_text(text)
        refused(folder, "config.json|could not be loaded")
        refused(folder, "config.json|could not be loaded", remote=True)

    @pytest.mark.parametrize("length", [0, 5, 2000, -100])
    def test_truncated_weights(self, copy, length):
        path = copy() / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        refused(path.parent, "could not be loaded")

    def test_corrupt_weights(self, copy):
        path = copy() / "model.safetensors"
        path.write_bytes(b"no weights" * 100)
        refused(path.parent, "could not be loaded")

    def test_no_weights(self, copy):
        folder = copy()
        (folder / "model.safetensors").unlink()
        refused(folder, "no file named model.safetensors")

    @pytest.mark.parametrize("key", ["backbone.layers.1.mixer.D", "backbone.embeddings.weight"])
    def test_missing_weights(self, copy, key):
        refused(copy(lambda weights: weights.pop(key)), f"weights lack {key}")

    def test_more_layers_than_weights(self, copy):
        refused(copy(num_hidden_layers=4), "weights lack backbone.layers.3")

    def test_more_weights_than_layers(self, copy):
        refused(copy(num_hidden_layers=2), "weights hold backbone.layers.2.* and 9 more")

    @pytest.mark.parametrize("sizes", [{"state_size": 8}, {"hidden_size": 16}, {"vocab_size": 601}, {"conv_kernel": 3}])
    def test_other_shapes(self, copy, sizes):
        refused(copy(**sizes), "has the shape .* and its config asks for")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, copy, value):
        refused(copy(lambda weights: weights["backbone.layers.1.mixer.D"].fill_(value)), "not finite")


class TestSlowPath:
    """The check at load."""

    @staticmethod
    def replace_scan(monkeypatch, factor):
        """Multiply the scan's outputs by ``factor(layer)``."""
        right, calls = mamba_ioi.trace.s6.selective_scan, []

        def wrong(*args, **kwargs):
            y, last = right(*args, **kwargs)
            calls.append(1)
            return y * factor(len(calls) - 1), last

        monkeypatch.setattr(mamba_ioi.trace.s6, "selective_scan", wrong)

    @pytest.mark.parametrize(
        ("factor", "words"),
        [
            (lambda layer: 1.001, r"first site that differs is blocks\.0\.hook_after_skip, by"),
            (lambda layer: 1.01 if layer == 1 else 1.0, r"first site that differs is blocks\.1\.hook_after_skip, by"),
            (lambda layer: float("nan"), r"blocks\.0\.hook_after_skip, by nan"),
        ],
    )
    def test_a_wrong_scan(self, monkeypatch, factor, words):
        self.replace_scan(monkeypatch, factor)
        with pytest.raises(ValueError, match=words) as error:
            wrap(random_mamba(), None, model_id="random")
        assert "does not reproduce random" in str(error.value)

    def test_a_wrong_conv(self, monkeypatch):
        right = mamba_ioi.trace.conv.conv_terms
        monkeypatch.setattr(mamba_ioi.trace.conv, "conv_terms", lambda *a: right(*a) * 1.01)
        with pytest.raises(ValueError, match=r"first site that differs is blocks\.0\.hook_ssm_input, by"):
            wrap(random_mamba(), None, model_id="random")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_a_right_one(self, dtype):
        model = wrap(random_mamba(dtype=dtype), None, model_id="random")
        assert check_slow_path(model) < (5e-2 if dtype == torch.bfloat16 else 1e-5)

    def test_a_mixer_without_the_operations(self, monkeypatch):
        monkeypatch.setattr(mamba_ioi.trace.s6.S6Stages, "OPERATION", "source.selective_scan_fn_7")
        with pytest.raises(ValueError, match=rf"{transformers.__version__} .* without selective_scan_fn_7"):
            wrap(random_mamba(), None, model_id="random")


class TestRemote:
    """A model built without weights, as a client of a server builds it; without its server it loads them here."""

    @pytest.mark.parametrize("packaged", [True, False])
    def test_building_and_dispatching(self, saved, packaged):
        name = "tiny" if packaged else saved
        model, loaded = load_model(name, remote=True), load_model(name)
        assert isinstance(model, MambaModel) and next(model._module.parameters()).is_meta
        model.remote = None
        assert model.sizes() == loaded.sizes() and model.n_layers == loaded.n_layers
        text = repr(model)
        assert all(f"({site.attribute}) -> Float[Tensor" in text for site in SITES.values())
        model.dispatch()
        assert torch.equal(logits(model, IDS), logits(loaded, IDS))
        patches = [Patch(name, i, 0.1, [2]) for i in range(3) for name in ("in_proj", "conv", "B", "h", "out_proj")]
        assert torch.equal(run(model, IDS, patches), run(loaded, IDS, patches))

    def test_the_first_trace_dispatches(self, saved):
        model, loaded = load_model(saved, remote=True), load_model(saved)
        model.remote = None
        with torch.no_grad(), model.trace(IDS):
            in_proj = model.layers[1].mixer.in_proj.output.save()
            conv = model.layers[1].mixer.conv.save()
            out = model.lm_head.output.save()
        assert in_proj.shape == (2, 7, 48)
        assert torch.equal(out, logits(loaded, IDS))
        torch.testing.assert_close(conv, cache(loaded, IDS, ["blocks.1.hook_conv"])["conv", 1])

    def test_without_a_tokenizer(self, copy):
        folder = copy()
        for path in folder.glob("*token*"):
            path.unlink()
        model = load_model(folder, remote=True)
        assert model.tokenizer is None
        model.remote = None
        model.dispatch()
        assert torch.equal(run(model, IDS), run(load_model(folder), IDS))

    def test_another_language_model(self, tmp_path):
        config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        model = load_model(tmp_path, remote=True)
        assert type(model) is CausalLM and model.n_layers == 2
        model.remote = None
        with torch.no_grad(), model.trace(IDS):
            out = model.lm_head.output.save()
        assert torch.equal(out, logits(load_model(tmp_path), IDS))


@pytest.mark.slow
def test_an_older_transformers_is_refused_at_import():
    code = (  # to import a model puts the module transformers in its place anew
        "import sys; from transformers import MambaForCausalLM; "
        "sys.modules['transformers'].__version__ = '5.14.1'; import mamba_ioi; mamba_ioi.load_model"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1
    assert "needs transformers 5.15 or newer, not 5.14.1" in done.stderr
    assert "causal_conv1d_fn and mamba_selective_scan" in done.stderr
