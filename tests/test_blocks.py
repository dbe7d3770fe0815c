"""The residual stream's sites in transformers, against torch hooks and blocks that are put together by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from nnsight.modeling.huggingface import _ID_CACHE
from torch import Tensor, nn

from mamba_ioi import IOIDataset, Patch, cache, load_model, run
from mamba_ioi.experiments import resample_ablation
from mamba_ioi.interventions.patch import Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import CausalLM, wrap
from mamba_ioi.remote import ndif

from .plain import effects
from .test_any_model import CONFIGS, TOKENIZER, V, untouched
from .test_remote import Worker

LAYER = 1
MLP: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gpt2": lambda block, mid: block.mlp(block.ln_2(mid)),
    "llama": lambda block, mid: block.mlp(block.post_attention_layernorm(mid)),
    "starcoder2": lambda block, mid: block.mlp(block.post_attention_layernorm(mid)),
    "granite": lambda block, mid: block.mlp(block.post_attention_layernorm(mid)) * 0.3,
    "gemma2": lambda block, mid: block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(mid))),
}
NORM = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}
PARTS = ["resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]


@pytest.fixture(scope="module", params=MLP)
def model(request) -> CausalLM:
    return wrap(untouched(CONFIGS[request.param]()), TOKENIZER, model_id=request.param)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(4))


def stream(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def by_hand(model: CausalLM, edits: dict[str, Callable[[Tensor], Tensor]], seen: dict[str, Tensor]):
    """Put one block together from what its attention adds to its input and from its MLP, each value edited."""
    block, kind, busy = model.layers[LAYER]._module, model.model_id, []

    def site(name: str, value: Tensor) -> Tensor:
        seen[name] = edits.get(name, lambda same: same)(value)
        return seen[name]

    def replaced(_, args, kwargs, output):
        if busy:
            return None
        busy.append(True)
        x = site("resid_pre", args[0] if args else kwargs["hidden_states"])
        a_in, caught = site("attn_in", x), []
        norm = getattr(block, NORM.get(kind, "post_attention_layernorm"))
        handle = norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        block(a_in, *args[1:], **{key: value for key, value in kwargs.items() if key != "hidden_states"})
        handle.remove()
        mid = site("resid_mid", x + site("attn_out", caught[0] - a_in))
        after = site("resid_post", mid + site("mlp_out", MLP[kind](block, site("mlp_in", mid))))
        busy.clear()
        return (after, *output[1:]) if isinstance(output, tuple) else after

    handle = block.register_forward_hook(replaced, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def forward(model: CausalLM, ids: Tensor, **edits) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with by_hand(model, edits, seen):
        seen["logits"] = model._module(ids, use_cache=False).logits
    return seen


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def at(value: Tensor | float, positions: list[int]) -> Callable[[Tensor], Tensor]:
    def edit(there: Tensor) -> Tensor:
        there = there.clone()
        there[:, positions] = value
        return there

    return edit


@pytest.mark.parametrize("name", PARTS)
def test_reads_and_writes(model, ids, name):
    assert model.sites_of(LAYER) == PARTS
    plainly, there = forward(model, ids), forward(model, ids.flip(0))[name][:, [2, 4]]
    close(plainly["logits"], model._module(ids).logits)
    close(cache(model, ids, [(name, LAYER)])[name, LAYER], plainly[name])
    expected = forward(model, ids, **{name: at(there, [2, 4])})
    assert (expected["logits"] - plainly["logits"]).abs().max() > 1e-4
    patch = [Patch(name, LAYER, there, [2, 4])]
    close(run(model, ids, patch, positions="all"), expected["logits"])
    later = [one for one in PARTS if one != name] if name != "mlp_in" else ["mlp_out", "resid_post"]
    found = cache(model, ids, [(one, LAYER) for one in later], patches=patch)
    for one in later:
        close(found[one, LAYER], expected[one])


def test_sites_outside_the_layers(model, ids):
    seen, module = {}, model._module
    for name, part in (("embed", module.get_input_embeddings()), ("norm", model.final_norm._module)):
        part.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        seen["logits"] = module(ids, use_cache=False).logits
    seen["embed"] = seen["embed"] * getattr(module.config, "embedding_multiplier", 1.0)
    for part in (module.get_input_embeddings(), model.final_norm._module):
        part._forward_hooks.clear()
    found = cache(model, ids, list(seen))
    for name, value in seen.items():
        close(found[name], value)
        close(run(model, ids, [Patch(name, None, value)], positions="all"), seen["logits"])
        assert not torch.allclose(run(model, ids, [Patch(name, None, 0.3, [2, -1])]), seen["logits"][:, -1], atol=1e-3)


@pytest.mark.parametrize("name", PARTS)
def test_a_sweep(model, ids, name):
    source, last = ids.flip(0), torch.tensor([6, 5, 6])
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(ids[:, :3], last, zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    there = forward(model, source)[name]
    changes = [[], [Resample(name, LAYER, 3)], [Patch(name, LAYER, 0.5, [1])], [Resample(name, LAYER)]]
    found = sweep(model, ids, changes, readout, source=source)
    edits = [{}, {name: at(there[:, [3]], [3])}, {name: at(0.5, [1])}, {name: lambda value: there}]
    expected = [forward(model, ids, **edit)["logits"][torch.arange(3), last].gather(1, ids[:, :3]) for edit in edits]
    close(found, torch.stack(expected))


def test_resample_ablation(model):
    data = IOIDataset.generate(TOKENIZER, 2, seed=27, templates="aligned")
    table = resample_ablation(model, data, site="attn_out", layers=[LAYER], positions=[3, 5], progress=False).table
    there = forward(model, data.corrupt_tokens)["attn_out"]
    for position in (3, 5):
        logits = forward(model, data.clean_tokens, attn_out=at(there[:, [position]], [position]))["logits"]
        found = effects(model._module, data, logits[torch.arange(len(data)), data.last_position])
        rows = table[table.position == position]
        assert float((rows.effect * rows.n).sum() / rows.n.sum()) == pytest.approx(float(found.mean()), abs=2e-3)


BESIDE = {
    "gpt_neox": ("input_layernorm", "attention", "post_attention_layernorm", "mlp"),
    "phi": ("input_layernorm", "self_attn", "input_layernorm", "mlp"),
}
"""Blocks whose parts stand side by side: norm and attention, norm and MLP; of phi they share the norm."""


@torch.no_grad()
def forward_beside(model: CausalLM, ids: Tensor, **edits) -> dict[str, Tensor]:
    """One block as its input and what attention and MLP make of their own copies of it, each value edited."""
    names, block, seen, busy = BESIDE[model.model_id], model.layers[LAYER]._module, {}, []
    attn_norm, attn, mlp_norm, mlp = (getattr(block, name) for name in names)

    def site(name: str, value: Tensor) -> Tensor:
        seen[name] = edits.get(name, lambda same: same)(value)
        return seen[name]

    def attended(_, args, kwargs):
        """The attention has its own copy of the stream, whatever the MLP reads."""
        own = attn_norm.forward(site("attn_in", seen["resid_pre"]))
        return ((own, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": own})

    def replaced(_, args, kwargs, output):
        added = site("attn_out", busy[0]) + site(
            "mlp_out", mlp.forward(mlp_norm.forward(site("mlp_in", seen["resid_pre"])))
        )
        after = site("resid_post", seen["resid_pre"] + added)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def begun(_, args, kwargs):
        value = site("resid_pre", args[0] if args else kwargs["hidden_states"])
        return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})

    handles = [
        block.register_forward_pre_hook(begun, with_kwargs=True),
        attn.register_forward_pre_hook(attended, with_kwargs=True),
        attn.register_forward_hook(lambda _, args, output: busy.append(output[0])),
        block.register_forward_hook(replaced, with_kwargs=True),
    ]
    seen["logits"] = model._module(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", BESIDE)
def test_parts_that_stand_side_by_side(kind, ids):
    model = wrap(untouched(CONFIGS[kind]()), TOKENIZER, model_id=kind)
    names = [name for name in PARTS if name != "resid_mid"]
    assert model.sites_of(LAYER) == names
    plainly, other = forward_beside(model, ids), forward_beside(model, ids.flip(0))
    close(plainly["logits"], model._module(ids).logits.detach())
    for name in names:
        close(cache(model, ids, [(name, LAYER)])[name, LAYER], plainly[name])
        there = other[name][:, [2, 4]]
        expected = forward_beside(model, ids, **{name: at(there, [2, 4])})
        assert (expected["logits"] - plainly["logits"]).abs().max() > 1e-4
        patch = [Patch(name, LAYER, there, [2, 4])]
        close(run(model, ids, patch, positions="all"), expected["logits"])
        found = cache(model, ids, [(one, LAYER) for one in names], patches=patch)
        for one in names:
            close(found[one, LAYER], expected[one])


@pytest.mark.parametrize("kind", ["opt", "rwkv"])
def test_what_is_not_there_is_named(kind, ids):
    """Parts on other shapes have no sites; the stream's are there."""
    model = wrap(untouched(CONFIGS[kind]()), TOKENIZER, model_id=kind)
    assert model.sites_of(0) == ["resid_pre", "resid_post"]
    with pytest.raises(ValueError, match="has no site 'attn_out'; it has resid_pre, resid_post"):
        run(model, ids, [Patch("attn_out", 0, 0.0)])
    with pytest.raises(ValueError, match=r"sites such as 'h' need a Mamba; .* has resid_pre, resid_post"):
        cache(model, ids, [("h", 0)])
    inputs = []
    model.layers[1]._module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model._module(ids, use_cache=False)
    model.layers[1]._module._forward_pre_hooks.clear()
    close(cache(model, ids, [("resid_pre", 1)])["resid_pre", 1], inputs[0])


@pytest.mark.slow
def test_on_a_server(ids, tmp_path, monkeypatch):
    """Its reads, writes and sweeps, on a server without this package."""
    untouched(CONFIGS["granite"]()).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    worker = Worker(tmp_path)
    monkeypatch.setattr(ndif.Backend, "_exchange", lambda self, *request: worker.exchange(self, *request))
    monkeypatch.setitem(_ID_CACHE, str(tmp_path), "random/granite")
    here, there = load_model(tmp_path), load_model(tmp_path, remote=True)
    try:
        assert there.sites_of(LAYER) == PARTS and there.layer_kinds == ["attention+mlp"] * 3
        everything = [*((name, LAYER) for name in PARTS), "embed", "norm", "logits"]
        for key, value in cache(here, ids, everything).items():
            close(cache(there, ids, everything)[key], value)
        for name in PARTS:
            patch = [Patch(name, LAYER, 0.4, [2])]
            close(run(there, ids, patch), run(here, ids, patch))
    finally:
        worker.process.kill()
