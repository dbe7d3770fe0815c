"""Token to token: the mixing matrix, cuts, knockout and token edges, against sums written out pair by pair."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import FalconMambaConfig, FalconMambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from mamba_ioi import (
    Cut,
    IOIDataset,
    Patch,
    PromptPairs,
    cache,
    experiments,
    generate,
    hidden_attention,
    load_model,
    metrics,
    planted,
    run,
    token_contributions,
)
from mamba_ioi.circuits import Circuit, eap, evaluate, token_edges
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import Resample, sweep
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.remote import ndif
from mamba_ioi.trace import mixing
from mamba_ioi.zoo import EMBEDDED

from .conftest import random_mamba, randomized
from .plain import forward_by_hand
from .test_remote import Worker, undispatched

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
def source() -> Tensor:
    return torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(2))


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

    @pytest.mark.parametrize("family", ["mamba", "mamba2"])
    def test_where_they_cancel(self, family):
        """In a planted layer a name that comes back is taken out of the sum again: zero, of which each part is told."""
        model = planted(n_layers=3, layer=1, n_names=8, family=family)
        data = IOIDataset.generate(model.tokenizer, 4)
        found = token_contributions(model, data.clean_tokens, 1, targets=-1)
        added = cache(model, data.clean_tokens, [("out_proj", 1)], positions=-1)["out_proj", 1]
        torch.testing.assert_close(found.sum(2), added, **ROUNDED)
        lengths = found[:, 0].norm(dim=-1)
        names = list(model.planted.arrival_positions)
        torch.testing.assert_close(lengths[:, names], added.norm(dim=-1).expand(-1, 5), rtol=1e-3, atol=0)
        lengths[:, names] = 0
        assert lengths.max() < 1e-4


def cut_edits(layer: int, pairs: Tensor, new: Tensor | None = None, taps: Tensor | None = None) -> dict:
    """Edits of `forward_by_hand` that cut pairs ``[B, t, s]`` in a layer, one contribution at a time.

    Args:
        layer: the layer.
        pairs: which targets and sources.
        new: the writes that take the place of those cut; none if None.
        taps: the conv's terms that take their place; None leaves them as they are.
    """
    seen: dict[str, Tensor] = {}

    def see(name):
        def keep(value):
            seen[name] = value
            return value

        return keep

    def y(value):
        A_bar, write, C, value = seen["A_bar"], seen["write"], seen["C"], value.clone()
        length, heads = value.shape[1], write.shape[2]
        if write.dim() == 5:
            A_bar, C = A_bar[..., None, None], C[:, :, torch.arange(heads) // (heads // C.shape[2])][:, :, :, None]
        else:
            C = C[:, :, None]
        for t in range(length):
            for s in range(t + 1):
                carried = (0 if new is None else new[:, s]) - write[:, s]
                for r in range(s + 1, t + 1):
                    carried = A_bar[:, r] * carried
                value[:, t] += pairs[:, t, s, None] * (C[:, t] * carried).sum(-1).flatten(1)
        return value

    def conv_slice(value):
        value = value.clone()
        for t in range(value.shape[1]):
            for back in range(min(4, t + 1)):
                at = pairs[:, t, t - back, None]
                value[:, t, :, -1 - back] = torch.where(at, taps[:, t, :, -1 - back], value[:, t, :, -1 - back])
        return value

    edits = {(name, layer): see(name) for name in ("A_bar", "write", "C")} | {("y", layer): y}
    return edits | ({} if taps is None else {("conv_slice", layer): conv_slice})


def pair_mask(sources, targets, rows: int = 3, length: int = 9) -> Tensor:
    """Which pairs [B, t, s] a cut names; positions common to all rows, or each row's own."""
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for row in range(rows):
        for s in sources[row] if isinstance(sources, Tensor) else sources:
            for t in targets[row] if isinstance(targets, Tensor) else targets:
                if int(s) != -1 and int(t) != -1:
                    mask[row, int(t), int(s)] = True
    return mask


OWN = torch.tensor([[0, 2], [3, -1], [1, 5]]), torch.tensor([[8], [6], [4]])
PLACES = {"one": ([2], [7]), "lists": ([1, 3, 6], [3, 5, 8]), "all": (range(9), range(9)), "own": OWN}


def logits_by_hand(exact, ids, edits) -> Tensor:
    with torch.no_grad():
        return forward_by_hand(exact, ids, edits)["hook_logits"].float()


class TestCut:
    @pytest.mark.parametrize("kind", PLACES)
    @pytest.mark.parametrize("resample", [False, True])
    @pytest.mark.parametrize("conv", [False, True])
    def test_by_hand(self, model, exact, ids, source, kind, resample, conv):
        sources, targets = PLACES[kind]
        there = by_hand(exact, source)
        taps = None if not conv else there["conv_slice"] * resample
        edits = cut_edits(LAYER, pair_mask(sources, targets), there["write"] if resample else None, taps)
        cut = Cut(LAYER, sources, targets, resample=resample, conv=conv)
        found = run(model, ids, [cut], positions="all", source=source if resample else None)
        torch.testing.assert_close(found, logits_by_hand(exact, ids, edits), **ROUNDED)
        plain = run(model, ids, positions="all")
        assert (found[:, 8] - plain[:, 8]).abs().max() > 1e-4

    @pytest.mark.parametrize("resample", [False, True])
    def test_several_layers_beside_patches(self, model, exact, ids, source, resample):
        """A cut in two layers, with values patched at sites before and after the scan's output, and states held."""
        new = by_hand(exact, source)["write"] if resample else None
        mask = pair_mask([1, 3], [6, 8])
        edits = cut_edits(1, mask, new) | cut_edits(2, mask, by_hand(exact, source, 2)["write"] if resample else None)
        C = edits["C", 1]

        def doubled(value):
            value = value.clone()
            value[:, 7] = 0.2
            return C(value)

        def input_there(value):
            value = value.clone()
            value[:, 3] = 0.5
            return value

        edits |= {("C", 1): doubled, ("ssm_input", 1): input_there}
        patches = [Patch("C", 1, 0.2, [7]), Patch("ssm_input", 1, 0.5, [3])]
        changes = [*patches, Cut([1, 2], [1, 3], [6, -1], resample=resample)]
        expected = logits_by_hand(exact, ids, edits)
        found = run(model, ids, changes, positions="all", source=source if resample else None)
        torch.testing.assert_close(found, expected, **ROUNDED)

    def test_a_held_state_forgets(self, model, ids):
        """What sources before a replaced state gave has no way past it; what came after has."""
        held = Patch("h", LAYER, 0.3, [4])
        plain = run(model, ids, [held])
        torch.testing.assert_close(run(model, ids, [held, Cut(LAYER, [0, 2, 4], -1)]), plain, rtol=0, atol=1e-6)
        assert (run(model, ids, [held, Cut(LAYER, 5, -1)]) - plain).abs().max() > 1e-4
        assert (run(model, ids, [Cut(LAYER, [0, 2, 4], -1)]) - run(model, ids)).abs().max() > 1e-4

    def test_everything_cut_leaves_nothing(self, model, ids):
        y = cache(model, ids, [("y", LAYER)], patches=[Cut(LAYER, range(9), [4, 7])])["y", LAYER]
        plain = cache(model, ids, [("y", LAYER)])["y", LAYER]
        torch.testing.assert_close(y[:, [4, 7]], torch.zeros_like(y[:, [4, 7]]), rtol=0, atol=1e-6)
        others = [0, 1, 2, 3, 5, 6, 8]
        assert torch.equal(y[:, others], plain[:, others])

    def test_states_stay(self, model, ids):
        at = [("h", LAYER)]
        cut = cache(model, ids, at, patches=[Cut(LAYER, [1, 2], [5])])
        assert torch.equal(cut["h", LAYER], cache(model, ids, at)["h", LAYER])

    def test_own_writes_change_nothing(self, model, ids):
        cut = Cut([0, 1, 2], range(9), range(9), resample=True, conv=True)
        torch.testing.assert_close(run(model, ids, [cut], source=ids), run(model, ids), rtol=0, atol=1e-5)

    def test_memory_changes_nothing(self, ids, source):
        model = copy.deepcopy(MODELS["mamba2"])
        cut = Cut(LAYER, *OWN, resample=True)
        whole = run(model, ids, [cut], source=source)
        model.memory = 1
        torch.testing.assert_close(run(model, ids, [cut], source=source), whole, rtol=0, atol=1e-6)

    def test_sweeps(self, model, ids, source):
        """As a run of each, wherever the sources are before the position that a patched run starts at."""
        source = torch.cat([ids[:, :2], source[:, 2:]], 1)
        last, every = torch.tensor([8, 7, 8]), torch.arange(61).expand(3, -1)
        answers = torch.arange(3)
        readout = Readout(every, last, answers, answers + 3, every)
        kinds = ({}, {"resample": True}, {"conv": True}, {"resample": True, "conv": True})
        cuts = [[Cut(1, [1, 3], [6, 7, 8], **kind)] for kind in kinds]
        cuts += [[Cut([0, 2], *OWN, **kind)] for kind in kinds]
        cuts += [[Cut([0, 1], 2, -1), Patch("h", 1, 0.3, [4]), Patch("C", 1, 0.2, [7])]]
        cuts += [[Cut([0, 1], 2, -1), Patch("h", 2, 0.3, [4])], [], [Cut(1, [1, 8], 8), Cut(1, 1, 7)]]
        found = sweep(model, ids, cuts, readout, source=source)
        for changes, logits in zip(cuts, found, strict=True):
            expected = run(model, ids, changes, positions=last, source=source)
            torch.testing.assert_close(logits, expected, **ROUNDED)
        both = sweep(model, ids, [[Resample("ssm_input", 0, [3]), Cut(1, 3, 8, resample=True)]], readout, source=source)
        there = cache(model, source, [("ssm_input", 0)])["ssm_input", 0]
        changes = [Patch("ssm_input", 0, there[:, [3]], [3]), Cut(1, 3, 8, resample=True)]
        torch.testing.assert_close(both[0], run(model, ids, changes, positions=last, source=source), **ROUNDED)

    def test_a_sweep_starts_at_the_first_target(self, ids, monkeypatch):
        from mamba_ioi.interventions import sweep as module

        begun, run_batch = [], module.run_batch
        monkeypatch.setattr(
            module, "run_batch", lambda model, batch: begun.append(batch.start) or run_batch(model, batch)
        )
        last, every = torch.full((3,), 8), torch.arange(61).expand(3, -1)
        readout = Readout(every, last, torch.arange(3), torch.arange(3) + 3, every)
        sweep(MODELS["mamba"], ids, [[Cut(1, [3, 5], [2, 6, 8])]], readout)
        assert begun == [6]

    @pytest.mark.parametrize("kind", [{}, {"resample": True}, {"resample": True, "conv": True}], ids=str)
    def test_generate(self, model, exact, ids, source, kind):
        """What is cut from the prompt's targets lasts through what follows from them."""
        sources, targets = list(range(9)), [5, 7, 8]
        patches, other = [Cut([0, 1], sources, targets, **kind)], source if kind else None
        found = generate(model, ids, 3, patches=patches, source=other)
        text, there = ids, [by_hand(exact, source, layer) for layer in (0, 1)]
        for _ in range(3):
            edits, longer = {}, text.shape[1] - ids.shape[1]
            mask = pair_mask(sources, targets, length=text.shape[1])
            for layer, acts in enumerate(there):
                write, taps = (
                    torch.cat([acts[name], acts[name][:, :longer]], 1) if kind.get(wanted) else None
                    for name, wanted in (("write", "resample"), ("conv_slice", "conv"))
                )
                edits |= cut_edits(layer, mask, write, taps)
            text = torch.cat([text, logits_by_hand(exact, text, edits)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, text)
        assert not torch.equal(generate(model, ids, 3), text)

    @pytest.mark.parametrize("kind", [{}, {"conv": True}, {"resample": True}], ids=str)
    @pytest.mark.parametrize("own", [False, True], ids=["common", "own"])
    def test_generate_with_cuts_of_new_tokens(self, model, exact, ids, source, kind, own):
        """Sources in the prompt, and among new tokens, from some new tokens; equal to texts run anew by hand."""
        sources, targets = [2, 6, 8] if kind.get("resample") else [2, 6, 8, 9, 10], [9, 10, 11]
        if own:
            sources = torch.tensor([[2, 7, 8], [8, -1, -1], [0, 6, 8] if kind.get("resample") else [5, 8, 10]])
            targets = torch.tensor([[9, 11], [10, -1], [11, 9]])
        patches = [Cut([0, 1], sources, targets, **kind), Patch("ssm_input", 1, 0.3, [10])]
        other = source if kind.get("resample") else None
        found = generate(model, ids, 4, patches=[Cut(2, 3, 7)], new_patches=patches, source=other)
        text, there = ids, [by_hand(exact, source, layer) for layer in (0, 1)]

        def put(value):
            if value.shape[1] > 10:
                value = value.clone()
                value[:, 10] = 0.3
            return value

        for _ in range(4):
            length = text.shape[1]
            mask = pair_mask(sources, targets, length=max(length, 12))[:, :length, :length]
            edits = cut_edits(2, pair_mask([3], [7], length=length), None)
            for layer, acts in enumerate(there):
                write = torch.cat([acts["write"]] * 2, 1)[:, :length] if kind.get("resample") else None
                shape = (3, length, *acts["conv_slice"].shape[2:])
                edits |= cut_edits(layer, mask, write, torch.zeros(shape).double() if kind.get("conv") else None)
            edits["ssm_input", 1] = put
            logits = logits_by_hand(exact, text, edits)[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, text)
        without = generate(model, ids, 4, patches=[Cut(2, 3, 7)], new_patches=patches[1:])
        assert own or not torch.equal(found, without)

    def test_a_cut_of_new_tokens_that_shows(self, ids):
        """All that the prompt gives to the first new token is taken from it; a state held in between holds."""
        model = MODELS["mamba"]
        every = [Cut([0, 1, 2], range(9), [9, 10], conv=True)]
        cut = generate(model, ids, 4, new_patches=every)
        assert not torch.equal(cut, generate(model, ids, 4))
        held = [Patch("h", 1, 0.5, [9]), *every]
        found, text = generate(model, ids, 4, new_patches=held), ids
        for length in range(9, 13):
            now = [Cut([0, 1, 2], range(9), [t for t in (9, 10) if t < length], conv=True)] if length > 9 else []
            now += [Patch("h", 1, 0.5, [9])] if length > 9 else []
            text = torch.cat([text, run(model, text, now).argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, text) and not torch.equal(found, cut)

    def test_refused_of_new_tokens(self, model, ids, source):
        for cut, sentence in (
            (Cut(1, 3, 8), "act where new tokens are read, at positions 9 to 11, not at 8"),
            (Cut(1, 3, [9, 12]), "targets .* of a prompt with 12 positions"),
            (Cut(1, 3, -1), "targets of a cut of new tokens are counted from 0 in the whole text, not -1"),
            (Cut(1, 11, 10), "no target at or after any source"),
            (Cut(7, 3, 10), "needs a layer from 0 to 2"),
            (Cut(1, [3, 9], 10, resample=True), "the source 9 cannot be resampled: the source prompts end at 8"),
            (Cut(1, 3, 10, resample=True, conv=True), "takes conv=True without resample=True"),
        ):
            with pytest.raises(ValueError, match=sentence):
                generate(model, ids, 4, new_patches=[cut], source=source)
        for patches, sentence in (
            ([Cut(1, 3, 10), Cut(1, [3, 4], [9, 10])], "take source 3 from target 10"),
            ([Cut(1, 3, 10), Patch("h_start", 1, 0.0)], "layer 1 has a cut of new tokens and a patched h_start"),
            (Cut(1, 3, 10), "entries are Patch or Cut"),
        ):
            with pytest.raises(ValueError, match=sentence):
                generate(model, ids, 4, new_patches=patches)
        with pytest.raises(ValueError, match="of which there are none, not at 8"):
            generate(model, ids, 1, new_patches=[Cut(1, 3, 8)])
        with pytest.raises(ValueError, match="needs source tokens"):
            generate(model, ids, 4, new_patches=[Cut(1, 3, 10, resample=True)])

    def test_generate_in_parts(self, ids, source):
        model = copy.deepcopy(MODELS["mamba"])
        given = {"patches": [Cut(LAYER, *OWN, resample=True)], "source": source}
        whole = generate(model, ids, 3, **given)
        model.memory = 1
        assert torch.equal(generate(model, ids, 3, **given), whole)

    def test_refused(self, model, ids, source):
        for cut, sentence in (
            (Cut(1, [5, 6], [2, 4]), r"no target at or after any source: sources \[5, 6\], targets \[2, 4\]"),
            (Cut(1, torch.tensor([[5], [-1], [8]]), 4), "no target at or after any source, in any row"),
            (Cut(3, 1, 2), "needs a layer from 0 to 2, not 3"),
            (Cut([], 1, 2), "at least one layer, each once"),
            (Cut([1, 1], 1, 2), "at least one layer, each once"),
            (Cut(1, 9, 2), r"sources \[9\] of a prompt with 9 positions"),
            (Cut(1, 1, [2, -7]), "targets .* name one position twice"),
            (Cut(1, 1, 2, resample=True), "needs source tokens"),
            (Cut(1, 1, 2, conv=1), "conv of a cut is True or False"),
        ):
            with pytest.raises(ValueError, match=sentence):
                run(model, ids, [cut])
        with pytest.raises(ValueError, match="take source 2 from target 6"):
            run(model, ids, [Cut(1, [2, 3], [6]), Cut(1, [1, 2], [5, 6])])
        with pytest.raises(ValueError, match="source tokens have the shape of tokens"):
            run(model, ids, [Cut(1, 1, 2, resample=True)], source=source[:, :4])
        with pytest.raises(ValueError, match="needs source tokens: give source= to run, sweep or generate"):
            generate(model, ids, 1, patches=[Cut(1, 1, 2, resample=True)])
        with pytest.raises(ValueError, match="source tokens have the shape of tokens"):
            generate(model, ids, 1, patches=[Cut(1, 1, 2, resample=True)], source=source[:, :4])


@pytest.fixture(scope="module")
def tiny() -> MambaModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def data(tiny) -> IOIDataset:
    return IOIDataset.generate(tiny.tokenizer, 5)


def effects_by_runs(model, data, cut, source=None) -> tuple[Tensor, Tensor]:
    """1 - NLD of each row under a cut, and whether its answer is right, by runs of whole prompts."""
    at, answers = data.last_position, (data.answers, data.corrupt_answers)
    clean, corrupt = (run(model, ids, positions=at) for ids in (data.clean_tokens, data.corrupt_tokens))
    logits = run(model, data.clean_tokens, [cut], positions=at, source=source)
    nld = metrics.normalized_logit_diff(logits, clean, corrupt, *answers, absolute=False)
    return 1 - nld, metrics.accuracy(logits, data.answers, data.candidates)


class TestKnockout:
    def test_as_runs_of_each(self, tiny, data):
        found = experiments.knockout(tiny, data, ["n1+1", "n5+1"], ["last", "n5+1"], window=2, progress=False)
        table = found.table
        assert list(table.columns[:4]) == ["source", "target", "layer", "effect"]
        assert len(table) == 2 * 2 * 5 and set(table.n) == {10}
        for row in list(table.itertuples())[::3]:
            places = (data.positions_of(mark)[:, None] for mark in (row.source, row.target))
            effect, right = effects_by_runs(tiny, data, Cut([row.layer, row.layer + 1], *places))
            assert row.effect == pytest.approx(effect.mean().item(), abs=1e-4)
            assert row.accuracy == pytest.approx(right.double().mean().item())
            assert row.low <= row.effect <= row.high
        assert found.plot().axes and len(found.plot().axes) == 2

    def test_on_planted(self):
        """Without the write of the name that the answer is, nothing is left of it; without others', it stays."""
        model = planted(n_layers=3, layer=1, n_names=6)
        data = IOIDataset.generate(model.tokenizer, 6)
        sources = [f"n{slot}+1" for slot in range(1, 6)]
        table = experiments.knockout(model, data, [*sources, "n1"], progress=False).table
        elsewhere = (table.layer != 1) | (table.source == "n1")
        assert table.effect[elsewhere].abs().max() < 1e-3 and (table.accuracy[elsewhere] == 1).all()
        assert (table.accuracy[~elsewhere] < 1).all()
        resampled = [Cut(1, at + 1, -1, resample=True) for at in model.planted.name_positions]
        moved = [effects_by_runs(model, data, cut, data.corrupt_tokens)[0] for cut in resampled]
        differs = (data.clean_tokens != data.corrupt_tokens).float()[:, list(model.planted.name_positions)]
        torch.testing.assert_close(torch.stack(moved, 1), differs, rtol=0, atol=1e-3)

    def test_rows_without_a_place(self, tiny, data):
        marks = {"some": torch.where(torch.arange(10) < 4, 6, -1), "late": torch.full((10,), 17)}
        pairs = PromptPairs(
            clean_tokens=data.clean_tokens,
            corrupt_tokens=data.corrupt_tokens,
            answers=data.answers,
            corrupt_answers=data.corrupt_answers,
            marks=marks,
        )
        table = experiments.knockout(tiny, pairs, targets=["last", "some"], layers=1, progress=False).table
        assert table.n.tolist() == [4, 4, 10, 0] and table.source.tolist() == ["some", "some", "late", "late"]
        assert table.effect.isna().tolist() == table.accuracy.isna().tolist() == [False, False, False, True]
        effect, _ = effects_by_runs(tiny, pairs[:4], Cut(1, 6, 19))
        assert table.effect[0] == pytest.approx(effect.mean().item(), abs=1e-4)
        at = experiments.knockout(tiny, pairs, 17, layers=1, metric="logit_diff", progress=False).table
        assert at.source.tolist() == [17] and at.n.tolist() == [10]

    def test_with_the_taps_of_the_conv(self, tiny, data):
        """A name's own token cut from the next one: in layer 1 by tap -1, for which the scan alone is not enough."""
        given = (tiny, data, "n5", "n5+1")
        scan, both = (experiments.knockout(*given, layers=1, conv=c, progress=False) for c in (False, True))
        effect, _ = effects_by_runs(tiny, data, Cut(1, *(data.positions_of(m)[:, None] for m in given[2:]), conv=True))
        assert both.table.effect[0] == pytest.approx(effect.mean().item(), abs=1e-4)
        assert abs(scan.table.effect[0]) < 0.02 < 0.1 < both.table.effect[0]
        assert both.meta["arguments"]["conv"] is True and scan.meta["arguments"]["conv"] is False

    def test_a_callable_metric(self, tiny, data):
        def first(logits, pairs):
            return logits.gather(1, pairs.answers[:, None])[:, 0]

        table = experiments.knockout(tiny, data, "n5+1", layers=1, metric=first, progress=False).table
        at = data.last_position
        plain, cut = (run(tiny, data.clean_tokens, c, positions=at) for c in ([], [Cut(1, 16, -1)]))
        assert table.effect[0] == pytest.approx((first(plain, data) - first(cut, data)).mean().item(), abs=1e-4)
        assert table.accuracy[0] == metrics.accuracy(cut, data.answers, data.candidates).double().mean()

    def test_refused(self, tiny, data):
        for given, sentence in (
            ({"sources": "n9"}, "no mark 'n9'"),
            ({"sources": 40}, "positions are whole numbers from 0 to 19"),
            ({"sources": "n1", "window": 7}, "window must be a whole number from 1 to 6"),
            ({"sources": "n1", "window": 2, "layers": 5}, "a window of 2 layers from layer 5 on"),
            ({"sources": "n1", "conv": 1}, "conv of a cut is True or False, not 1"),
            ({"sources": "n5", "targets": "n1"}, "in no row is a target of 'n1' at or after a source of 'n5'"),
        ):
            with pytest.raises(ValueError, match=sentence):
                experiments.knockout(tiny, data, progress=False, **given)


class TestTokenEdges:
    @pytest.mark.parametrize("family", ["mamba", "mamba2"])
    @pytest.mark.parametrize(
        ("layer", "slice", "seed"), [(2, -1, 0), (1, 0, 3), (3, -3, 5), (0, -2, 1)], ids=["-1", "0", "-3", "first"]
    )
    @pytest.mark.parametrize("exact", [False, True])
    def test_planted(self, family, layer, slice, seed, exact):
        """The five names' edges into the last position of the planted layer, and no others."""
        model = planted(n_layers=4, layer=layer, slice=slice, seed=seed, n_names=8, family=family)
        data = IOIDataset.generate(model.tokenizer, 10)
        result = token_edges(model, data, exact=exact, layers=[layer, (layer + 1) % 4])
        table = result.table
        assert list(table.columns) == ["layer", "source", "target", "score"]
        assert len(table) == 2 * 20 * 21 / 2 and result.meta["arguments"]["exact"] == exact
        right = (table.layer == layer) & (table.target == 19) & table.source.isin(model.planted.arrival_positions)
        differs = (data.clean_tokens != data.corrupt_tokens).float().mean(0)
        for row in table[right].itertuples():
            share = differs[row.source + slice].item()  # of rows with another name there: each loses all
            assert row.score == pytest.approx(-share, abs=1e-3 if exact else 0.1)
        assert table.score[right].max() < -0.05
        assert table.score[~right].abs().max() < 1e-4

    @pytest.mark.parametrize(("steps", "ranks"), [(1, 0.95), (5, 0.7)])
    def test_the_estimate_agrees_with_the_measurement(self, tiny, data, steps, ranks):
        """Spearman's and Pearson's correlation; with more steps the order of the many small edges is told less well."""
        measured = token_edges(tiny, data, exact=True).table.score
        scores = token_edges(tiny, data, steps=steps).table.score
        live = measured != 0
        assert scores[live].rank().corr(measured[live].rank()) > ranks
        assert scores.corr(measured) > 0.97

    @pytest.mark.parametrize("metric", ["nld", "logit_diff"])
    def test_measured_as_runs_of_each(self, tiny, data, metric):
        table = token_edges(tiny, data, exact=True, layers=1, metric=metric).table
        for source, target in ((16, 19), (8, 19), (16, 17), (4, 4)):
            cut, source_tokens = Cut(1, source, target, resample=True), data.corrupt_tokens
            effect, _ = effects_by_runs(tiny, data, cut, source_tokens)
            if metric == "logit_diff":
                at, answers = data.last_position, (data.answers, data.corrupt_answers)
                plain, changed = (
                    metrics.logit_diff(run(tiny, data.clean_tokens, c, positions=at, source=source_tokens), *answers)
                    for c in ([], [cut])
                )
                effect = plain - changed
            (score,) = table.score[(table.source == source) & (table.target == target)]
            assert score == pytest.approx(-effect.mean().item(), abs=1e-4)

    def test_each_by_hand(self, ids):
        """One step, in float64: the gradient at y by autograd, times each edge's change by hand."""
        module = copy.deepcopy(MODELS["mamba2"]._module).double()
        model = wrap(module, None, model_id="random")
        source = ids.clone()
        source[:, 3] = (ids[:, 3] + 7) % 61
        one, other = torch.arange(3) + 1, torch.arange(3) + 4
        pairs = PromptPairs(clean_tokens=ids, corrupt_tokens=source, answers=one, corrupt_answers=other)
        seen = {}

        def leaf(value):
            seen["y"] = value.detach().requires_grad_()
            return seen["y"]

        logits = forward_by_hand(module, ids, {("y", LAYER): leaf})["hook_logits"][:, -1]
        (logits[range(3), [1, 2, 3]] - logits[range(3), [4, 5, 6]]).mean().backward()
        here, there = by_hand(module, ids), by_hand(module, source)
        heads, groups = here["write"].shape[2], here["C"].shape[2]
        C, moved = here["C"][:, :, torch.arange(heads) // (heads // groups)], there["write"] - here["write"]
        table = token_edges(model, pairs, steps=1, layers=LAYER, metric="logit_diff").table
        gradient = seen["y"].grad.unflatten(-1, (heads, -1))
        for row in table.itertuples():
            carried = moved[:, row.source]
            for r in range(row.source + 1, row.target + 1):
                carried = here["A_bar"][:, r, :, None, None] * carried
            expected = torch.einsum("bhp,bhpn,bhn->", gradient[:, row.target], carried, C[:, row.target]).item()
            assert row.score == pytest.approx(expected, rel=1e-4, abs=1e-6)

    def test_refused(self, tiny, data):
        for given, sentence in (
            ({"steps": 0}, "steps must be a whole number of at least 1"),
            ({"layers": 6}, "needs a layer from 0 to 5, not 6"),
            ({"layers": [1, 1]}, "layers are at least one, each once"),
        ):
            with pytest.raises(ValueError, match=sentence):
                token_edges(tiny, data, **given)
        with pytest.raises(ValueError, match="need aligned prompts"):
            token_edges(tiny, IOIDataset.generate(tiny.tokenizer, 8, templates="all"))


@pytest.mark.slow
def test_on_a_server(tiny, data, monkeypatch):
    """On a process that has nnsight and not this package everything is as it is here."""
    worker = Worker(EMBEDDED["tiny"])
    monkeypatch.setattr(ndif.Backend, "_exchange", lambda self, *request: worker.exchange(self, *request))
    there = undispatched(monkeypatch)
    try:
        two = data[:2]
        ids, source = two.clean_tokens, two.corrupt_tokens
        for cut in (Cut([1, 2], [3, 5], [12, -1]), Cut([1, 2], [3, 5], [12, -1], resample=True, conv=True)):
            one, other = (run(model, ids, [cut], source=source) for model in (there, tiny))
            torch.testing.assert_close(one, other, **ROUNDED)
        readout = Readout.of(two)
        one, other = (sweep(model, ids, [[cut], [Cut(1, 6, -1)]], readout, source=source) for model in (there, tiny))
        torch.testing.assert_close(one, other, **ROUNDED)
        for function in (hidden_attention, token_contributions):
            one, other = (function(model, ids, 1, targets=[-1, 5]) for model in (there, tiny))
            torch.testing.assert_close(one, other, **ROUNDED)
        for given in (
            {"patches": [Cut(1, 3, -1)], "new_patches": [Cut(1, [5, 20], 20)]},
            {"patches": [Cut(1, 3, -1, resample=True)], "source": source},
        ):
            assert torch.equal(*(generate(model, ids, 2, **given) for model in (there, tiny)))
        given = {"positional": True, "fine": True, "ssm": "tokens"}
        for score in (
            lambda model: token_edges(model, two, steps=2, layers=1, controls=True),
            lambda model: eap(model, two, steps=1, **given),
        ):
            one, other = (score(model).table for model in (there, tiny))
            pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=0, atol=1e-5)
        edges = [("embed", "1", p) for p in range(20)] + [("1.write[16]", "1.ssm", 19), ("1.controls", "1.ssm", 18)]
        circuit = Circuit.of(tiny, [*edges, ("1.ssm", "1", 19), ("1", "output", 19)])
        one, other = (evaluate(model, two, circuit) for model in (there, tiny))
        assert one.logit_diff == pytest.approx(other.logit_diff, abs=1e-4)
    finally:
        worker.process.kill()
