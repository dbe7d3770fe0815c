"""Token to token: the mixing matrix, cuts, knockout and token edges, against sums written out pair by pair."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import FalconMambaConfig, FalconMambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from mamba_ioi import cache, hidden_attention, token_contributions
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.trace import mixing

from .conftest import random_mamba, randomized
from .plain import forward_by_hand

FAMILIES = ("mamba", "mamba2", "falcon_mamba")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
LAYER = 1


def build(family: str, dtype: torch.dtype = torch.float32) -> MambaModel:
    """A random model of three layers."""
    sizes = {"vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 3, "state_size": 4}
    if family == "mamba":
        return wrap(random_mamba(dtype=dtype), None, model_id="random")
    if family == "mamba2":
        module = Mamba2ForCausalLM(Mamba2Config(head_dim=4, num_heads=6, n_groups=2, expand=2, **sizes))
    else:
        module = FalconMambaForCausalLM(FalconMambaConfig(time_step_rank=3, **sizes))
    return wrap(randomized(module).to(dtype), None, model_id="random")


MODELS = {family: build(family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request) -> MambaModel:
    return MODELS[request.param]


@pytest.fixture
def exact(model):
    """The same weights in float64, for forwards by hand."""
    return copy.deepcopy(model._module).double()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def by_hand(module, ids: Tensor, layer: int = LAYER) -> dict[str, Tensor]:
    """A layer's sites by the paper's equations."""
    with torch.no_grad():
        acts = forward_by_hand(module, ids)
    return {key.rpartition("hook_")[2]: value for key, value in acts.items() if key.startswith(f"blocks.{layer}.")}


def alpha_by_hand(acts: dict[str, Tensor]) -> Tensor:
    """``alpha`` [B, U, L, L], a pair of positions at a time."""
    A_bar, B_bar, C = acts["A_bar"], acts["B_bar"], acts["C"]
    rows, length, units = B_bar.shape[:3]
    if A_bar.dim() == 3:  # heads: one decay each, and C of the head's group
        A_bar, C = A_bar[..., None], C[:, :, torch.arange(units) // (units // C.shape[2])]
    else:
        C = C[:, :, None]
    alpha = B_bar.new_zeros(rows, units, length, length)
    for t in range(length):
        for s in range(t + 1):
            carried = B_bar[:, s]
            for r in range(s + 1, t + 1):
                carried = A_bar[:, r] * carried
            alpha[:, :, t, s] = (C[:, t] * carried).sum(-1)
    return alpha


class TestHiddenAttention:
    def test_every_pair(self, model, exact, ids):
        expected = alpha_by_hand(by_hand(exact, ids)).float()
        alpha = hidden_attention(model, ids, LAYER, reduce=None)
        torch.testing.assert_close(alpha, expected, **ROUNDED)
        torch.testing.assert_close(hidden_attention(model, ids, LAYER), expected.mean(1), **ROUNDED)

    def test_it_makes_y_of_x(self, model, ids):
        acts = cache(model, ids, [("y", LAYER), ("ssm_input", LAYER)])
        alpha = hidden_attention(model, ids, LAYER, reduce=None)
        x = acts["ssm_input", LAYER].unflatten(-1, (alpha.shape[1], -1))
        torch.testing.assert_close(torch.einsum("buts,bsup->btup", alpha, x).flatten(2), acts["y", LAYER], **ROUNDED)

    def test_units_and_targets(self, model, ids):
        alpha = hidden_attention(model, ids, LAYER, reduce=None)
        some = hidden_attention(model, ids, LAYER, reduce=None, units=[5, 2], targets=[-1, 3])
        torch.testing.assert_close(some, alpha[:, [5, 2]][:, :, [8, 3]], rtol=0, atol=1e-6)
        one = hidden_attention(model, ids, LAYER, units=4, targets=6)
        torch.testing.assert_close(one, alpha[:, 4, 6:7], rtol=0, atol=1e-6)
        own = torch.tensor([[1, 3], [4, 0], [8, 8]])
        rows = torch.arange(3)[:, None]
        mean = hidden_attention(model, ids, LAYER, targets=own)
        torch.testing.assert_close(mean, alpha.mean(1)[rows, own], rtol=0, atol=1e-6)

    def test_memory_changes_nothing(self, ids):
        model = copy.deepcopy(MODELS["mamba"])
        whole = hidden_attention(model, ids, LAYER)
        model.memory = 1
        torch.testing.assert_close(hidden_attention(model, ids, LAYER), whole, rtol=0, atol=1e-6)

    def test_refused(self, ids):
        model = MODELS["mamba"]
        for wrong, sentence in (
            ({"reduce": "sum"}, "reduce is 'mean' or None"),
            ({"units": [24]}, "units of layer 1 are 0 to 23"),
            ({"units": []}, "units of layer 1 are 0 to 23"),
            ({"targets": [9]}, "position 9 is outside"),
        ):
            with pytest.raises(ValueError, match=sentence):
                hidden_attention(model, ids, LAYER, **wrong)
        with pytest.raises(ValueError, match="needs a layer from 0 to 2, not 3"):
            hidden_attention(model, ids, 3)


class TestKernel:
    """The rectangles, where they are cut up, in float64."""

    @pytest.mark.parametrize("length", [1, 2, 13])
    @pytest.mark.parametrize("block", [1, 2**10, 2**22])
    def test_exact(self, length, block, monkeypatch):
        monkeypatch.setattr(mixing, "_BLOCK", block)
        draw = torch.Generator().manual_seed(length)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        for units, size, channels in ((5, 3, 1), (2, 4, 3)):
            A = -normal(units, size if channels == 1 else 1).exp()
            B, C = (normal(2, length, 1 if channels == 1 else units, size) for _ in range(2))
            scan = mixing.Units(normal(2, length, units).exp(), A, B, C, normal(2, length, units, channels))
            A_bar, B_bar = (scan.delta[..., None] * A).exp(), scan.delta[..., None] * B
            C = C[:, :, 0] if channels == 1 else C
            acts = {"A_bar": A_bar if channels == 1 else A_bar[..., 0], "B_bar": B_bar, "C": C}
            expected = alpha_by_hand(acts)
            every, some = range(length), sorted({0, length // 2, length - 1})
            torch.testing.assert_close(mixing.unit_mixing(scan, every), expected, **EXACT)
            torch.testing.assert_close(mixing.mean_mixing(scan, some), expected.mean(1)[:, some], **EXACT)
            gain, weight = normal(2, length, units * channels), normal(units * channels, 4)
            parts = torch.einsum("buts,bsup,btup->btsup", expected, scan.x, gain.unflatten(-1, (units, channels)))
            found = mixing.contributions(scan, some, gain[:, some], weight)
            torch.testing.assert_close(found, (parts.flatten(3) @ weight)[:, some], **EXACT)

    def test_nothing_overflows(self):
        delta = torch.full((1, 40, 2), 1e4)
        ones = torch.ones(1, 40, 1, 3)
        scan = mixing.Units(delta, -torch.ones(2, 3), ones, ones, torch.ones(1, 40, 2, 1))
        assert torch.equal(mixing.mean_mixing(scan, range(40))[0], 3e4 * torch.eye(40))


class TestContributions:
    def test_they_add_up(self, model, ids):
        found = token_contributions(model, ids, LAYER)
        assert found.shape == (3, 9, 9, 12)
        torch.testing.assert_close(found.sum(2), cache(model, ids, [("out_proj", LAYER)])["out_proj", LAYER], **ROUNDED)
        assert not found[:, torch.ones(9, 9).triu(1).bool()].any()
        last = token_contributions(model, ids, LAYER, targets=-1)
        torch.testing.assert_close(last, found[:, -1:], rtol=0, atol=1e-6)

    def test_each_by_hand(self, model, exact, ids):
        acts = by_hand(exact, ids)
        alpha, mixer = alpha_by_hand(acts), exact.backbone.layers[LAYER].mixer
        x = acts["ssm_input"].unflatten(-1, (alpha.shape[1], -1))
        y = torch.einsum("buts,bsup->btsup", alpha, x).flatten(3)
        gate = acts["skip"] * torch.sigmoid(acts["skip"])
        direct = acts["ssm_output"] - acts["y"]
        if hasattr(mixer, "norm"):
            gated = acts["ssm_output"] * gate
            scale = (gated.pow(2).mean(-1, keepdim=True) + mixer.norm.variance_epsilon).rsqrt()
            gate = gate * scale * mixer.norm.weight
        y[:, range(9), range(9)] += direct
        expected = (y * gate[:, :, None]) @ mixer.out_proj.weight.T
        found = token_contributions(model, ids, LAYER)
        torch.testing.assert_close(found, expected.detach().float(), rtol=1e-4, atol=1e-5)

    def test_where_the_output_is_zero(self, ids):
        """Contributions that cancel are told all the same: a scan's outputs are zero, and its gate and norm are not."""
        model = copy.deepcopy(MODELS["mamba2"])
        mixer = model._module.backbone.layers[LAYER].mixer
        with torch.no_grad():
            mixer.D.zero_()
            mixer.conv1d.weight[:4] = 0
            mixer.conv1d.bias[:4] = 0  # x of the first head
        found = token_contributions(model, ids, LAYER)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(2), cache(model, ids, [("out_proj", LAYER)])["out_proj", LAYER], **ROUNDED)
