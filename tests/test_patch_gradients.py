"""Gradients flow through runs with patches into what the patches bring: against autograd through the equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_ioi import Patch, cache, run
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.sweep import sweep

from . import hybrid_models
from .plain import forward_by_hand
from .test_steering import CASES, DOUBLE, LAYER, OWN, layer_of, vector_for

AT = [2, 5]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # the RMSNorm of transformers computes in float32


def by_hand(model, ids: Tensor, name: str, vector: Tensor, where: list[tuple[int, int]]) -> Tensor:
    """The gradient of a weighted sum of logits, by autograd through the equations."""
    leaf = vector.clone().requires_grad_()

    def put(value: Tensor, t: int | None = None) -> Tensor:
        mask = torch.zeros(value.shape[0], ids.shape[1], dtype=torch.float64)
        mask[tuple(zip(*where, strict=True))] = 1
        mask = mask if t is None else mask[:, t]
        return value + mask.reshape(*mask.shape, *[1] * leaf.dim()) * leaf

    logits = forward_by_hand(model._module, ids, {(name, layer_of(name)): put})["hook_logits"]
    return torch.autograd.grad(weighed(logits[:, -1]), leaf)[0]


def weighed(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    return (weights * logits).sum()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_into_a_callable_and_into_what_is_added(family, name, tokens) -> None:
    """At every site; into the model's weights flows none, and they ask for some as before."""
    model, at = DOUBLE[family], [*AT, 8]  # of the logits, where they are read
    vector = vector_for(model, name)
    expected = by_hand(model, tokens, name, vector, [(row, p) for row in range(4) for p in at])
    assert expected.abs().max() > 1e-4
    for callable_one in (True, False):
        leaf = vector.clone().requires_grad_()
        value = (lambda there, leaf=leaf: there + leaf) if callable_one else leaf
        patch = Patch(name, layer_of(name), value, at, add=not callable_one)
        with torch.enable_grad():
            found = torch.autograd.grad(weighed(run(model, tokens, [patch])), leaf)[0]
        torch.testing.assert_close(found, expected, **CLOSE)
    for parameter in model._module.parameters():
        assert parameter.requires_grad and parameter.grad is None
    with torch.no_grad():
        assert not run(model, tokens, [patch]).requires_grad
    assert not run(model, tokens, [Patch(name, layer_of(name), vector, at)]).requires_grad


@pytest.mark.parametrize("name", ["resid_post", "h", "ssm_input"])
@pytest.mark.parametrize("family", DOUBLE)
def test_at_own_positions_in_sweeps_and_in_caches(family, name, tokens) -> None:
    model, vector = DOUBLE[family], vector_for(DOUBLE[family], name)
    where = [(row, int(p)) for row in range(4) for p in OWN[row] if p >= 0]
    expected = by_hand(model, tokens, name, vector, where)
    leaf = vector.clone().requires_grad_()
    patch = Patch(name, LAYER, lambda there: there + leaf, OWN)
    with torch.enable_grad():
        whole = torch.autograd.grad(weighed(run(model, tokens, [patch])), leaf)[0]
        torch.testing.assert_close(whole, expected, **CLOSE)
        ids = torch.arange(4)
        readout = Readout(
            torch.arange(61).expand(4, -1), torch.full((4,), 8), ids, ids + 1, torch.stack([ids, ids + 1], 1)
        )
        swept = sweep(model, tokens, [[patch], []], readout)[0]
        torch.testing.assert_close(torch.autograd.grad(weighed(swept), leaf)[0], expected, **CLOSE)
        later = cache(model, tokens, ["logits", ("h", 2)], patches=[patch])
        torch.testing.assert_close(torch.autograd.grad(weighed(later["logits"][:, -1]), leaf)[0], expected, **CLOSE)
    assert not cache(model, tokens, [("h", 2)])["h", 2].requires_grad


def test_several_patches_and_a_second_layer(tokens) -> None:
    """Against finite differences: a value that is read in one layer is written, times a leaf, in the next."""
    model, seen = DOUBLE["mamba"], {}

    def keep(there: Tensor) -> Tensor:
        seen["value"] = there
        return 0.5 * there

    def logit(scale: Tensor) -> Tensor:
        patches = [
            Patch("out_proj", 0, keep, AT),
            Patch("layer_input", 1, lambda there: there + scale * seen["value"], AT),
            Patch("resid_pre", 1, lambda there: there * (1 + scale), [1], add=False),
            Patch("h", 2, lambda there: there * scale, [4]),
        ]
        return weighed(run(model, tokens, patches))

    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(logit(scale), scale)
    with torch.no_grad():
        step = torch.tensor(1e-3, dtype=torch.float64)
        expected = (logit(scale + step) - logit(scale - step)) / (2 * step)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("family", hybrid_models.MODELS)
def test_of_hybrids(family) -> None:
    """Into what is added to the stream after the first layer, against finite differences of the module itself."""
    model, module = hybrid_models.MODELS[family], hybrid_models.exact(hybrid_models.MODELS[family])
    ids, leaf = hybrid_models.IDS, torch.zeros(16, requires_grad=True)
    with torch.enable_grad():
        logits = run(model, ids, [Patch("resid_post", 0, lambda there: there + leaf, [3])])
        (found,) = torch.autograd.grad(weighed(logits), leaf)

    def moved(vector: Tensor) -> Tensor:
        def put(_, args, output):
            value = (output[0] if isinstance(output, tuple) else output).clone()
            value[:, 3] += vector
            return (value, *output[1:]) if isinstance(output, tuple) else value

        hook = module.model.layers[0].register_forward_hook(put)
        with torch.no_grad():
            logits = module(ids, use_cache=False).logits[:, -1]
        hook.remove()
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        return (weights * logits).sum()

    scale = float(found.abs().max())
    for index in (0, 7, 15):
        step = torch.zeros(16, dtype=torch.float64)
        step[index] = 1e-3
        expected = (moved(step) - moved(-step)) / 2e-3
        assert float(found[index]) == pytest.approx(float(expected), abs=2e-2 * scale)
