"""Edges from token to token in circuits: scored, measured and searched beside all other edges, against sums by hand."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ioi import PromptPairs, planted
from mamba_ioi.circuits import (
    Circuit,
    Graph,
    acdc,
    eap,
    evaluate,
    exact_effects,
    faithfulness,
    layer_view,
    minimal_circuit,
    rank_correlation,
    to_dot,
    token_edges,
    top_k,
)
from mamba_ioi.models.model import MambaModel, load_model, wrap
from mamba_ioi.tasks.ioi import IOIDataset
from mamba_ioi.trace.mixing import Units
from mamba_ioi.trace.tokens import shared_sources

from . import plain_circuits
from .conftest import RANDOM
from .plain import NAMES, forward_by_hand, prompt_tokenizer

TOKENIZER = prompt_tokenizer(NAMES)
TOKENS = {"positional": True, "fine": True, "ssm": "tokens"}


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 3, seed=27)


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    return wrap(RANDOM[request.param](seed=2, vocab_size=len(TOKENIZER)), TOKENIZER, model_id="random")


@pytest.fixture(scope="module")
def tiny() -> MambaModel:
    return load_model("tiny")


def short(seed: int, rows: int = 3, length: int = 6) -> PromptPairs:
    """Pairs of random prompts that part at the second position."""
    clean, corrupt = torch.randint(0, 61, (2, rows, length), generator=torch.Generator().manual_seed(seed))
    corrupt[:, 0] = clean[:, 0]
    answers = torch.arange(rows)
    return PromptPairs(clean_tokens=clean, corrupt_tokens=corrupt, answers=answers, corrupt_answers=answers + rows)


def scores_of(result) -> dict:
    return {(row.src, row.dst, row.position): row.score for row in result.table.itertuples()}


def inside(result, layer: int) -> tuple[dict, dict]:
    """The scores of a layer's writes, by (source, target), and of its controls, by target."""
    scores, node = scores_of(result), f"{layer}.ssm"
    into = {edge: score for edge, score in scores.items() if edge[1] == node}
    writes = {(int(src.split("[")[1][:-1]), t): score for (src, _, t), score in into.items() if "write" in src}
    return writes, {t: score for (src, _, t), score in into.items() if "controls" in src}


class TestScores:
    def test_they_are_the_effects_in_a_linear_model(self, data) -> None:
        linear = wrap(plain_circuits.linear_mamba(len(TOKENIZER), 2), TOKENIZER, model_id="linear")
        scores, effects = eap(linear, data, steps=1, **TOKENS).table, exact_effects(linear, data, **TOKENS).table
        assert scores[["src", "dst", "position"]].equals(effects[["src", "dst", "position"]])
        assert (scores.score - effects.score).abs().max() < 1e-5
        written = effects.src.str.contains("write")
        assert (effects.score[written].abs() > 1e-3).sum() > 5

    @pytest.mark.parametrize("metric", ["nld", "logit_diff"])
    def test_others_are_scored_as_without(self, model, data, metric) -> None:
        """The same edges as with ``ssm="conv"``, but for those into the SSM, score alike."""
        found = scores_of(eap(model, data, steps=2, metric=metric, **TOKENS))
        plain = scores_of(eap(model, data, steps=2, metric=metric, positional=True, fine=True))
        shared = [edge for edge in plain if not edge[0].endswith(".conv")]
        assert len(plain) - len(shared) == 3 * 20 and set(shared) < set(found)
        assert max(abs(found[edge] - plain[edge]) for edge in shared) < 1e-6

    @pytest.mark.parametrize("variant", ["standard", "paper"])
    def test_variants_agree_at_the_clean_run(self, model, data, variant) -> None:
        once = eap(model, data, steps=1, variant=variant, **TOKENS)
        table = token_edges(model, data, steps=1, controls=True).table
        for layer in range(3):
            writes, controls = inside(once, layer)
            for row in table[table.layer == layer].itertuples():
                score = controls[row.target] if row.source < 0 else writes[row.source, row.target]
                assert score == pytest.approx(row.score, abs=1e-6)

    @pytest.mark.parametrize("family", RANDOM)
    def test_each_by_hand(self, family) -> None:
        """In float64: the gradient at y by autograd, times what a write or the controls change there, pair by pair."""
        module, layer, pairs = RANDOM[family](seed=3).double(), 1, short(1)
        seen = {}

        def leaf(value: Tensor) -> Tensor:
            seen["y"] = value.detach().requires_grad_()
            return seen["y"]

        def sites(ids: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                acts = forward_by_hand(module, ids)
            return {name: acts[f"blocks.{layer}.hook_{name}"] for name in ("A_bar", "write", "C")}

        logits = forward_by_hand(module, pairs.clean_tokens, {("y", layer): leaf})["hook_logits"][:, -1]
        rows = torch.arange(3)
        (logits[rows, pairs.answers] - logits[rows, pairs.corrupt_answers]).mean().backward()
        clean, corrupt = sites(pairs.clean_tokens), sites(pairs.corrupt_tokens)
        found = eap(wrap(copy.deepcopy(module), None, model_id="random"), pairs, steps=1, metric="logit_diff", **TOKENS)
        writes, controls = inside(found, layer)
        assert len(writes) == 21 and len(controls) == 6
        here, there = ({key: broadcast(acts, key) for key in ("A_bar", "write", "C")} for acts in (clean, corrupt))
        plain, gain = plain_circuits.pair_by_pair("1", here | {"D x": torch.zeros(3, 6, 1)}, there, set()), seen["y"]
        for edge in [*writes, *controls]:
            name = ("1.controls", "1.ssm", edge) if isinstance(edge, int) else (f"1.write[{edge[0]}]", "1.ssm", edge[1])
            cut = plain_circuits.pair_by_pair("1", here | {"D x": torch.zeros(3, 6, 1)}, there, {name})
            expected = (gain.grad * (cut - plain)).sum().item()
            score = controls[edge] if isinstance(edge, int) else writes[edge]
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-6), name
        assert max(map(abs, controls.values())) > 1e-3 and max(map(abs, writes.values())) > 1e-3

    def test_no_pass_more(self, model, data, monkeypatch) -> None:
        """Forwards are counted by the first layer's in_proj, backwards by torch's call."""
        counts = {"forwards": 0, "backwards": 0}
        linear, grad, weight = F.linear, torch.autograd.grad, model._module.backbone.layers[0].mixer.in_proj.weight

        def counted_linear(value, given, bias=None):
            counts["forwards"] += given is weight
            return linear(value, given, bias)

        def counted_grad(*args, **kwargs):
            counts["backwards"] += 1
            return grad(*args, **kwargs)

        monkeypatch.setattr(F, "linear", counted_linear)
        monkeypatch.setattr(torch.autograd, "grad", counted_grad)
        seen = []
        for works in (
            lambda: eap(model, data, steps=3, positional=True, fine=True),
            lambda: eap(model, data, steps=3, **TOKENS),
            lambda: token_edges(model, data, steps=3),
            lambda: token_edges(model, data, steps=3, controls=True),
        ):
            counts.update(forwards=0, backwards=0)
            works()
            seen.append(dict(counts))
        assert seen[0]["backwards"] == 3 * (seen[0]["forwards"] // 6) > 0
        assert seen[1:] == [seen[0]] * 3


def broadcast(acts: dict[str, Tensor], key: str) -> Tensor:
    """A site as `pair_by_pair` takes it, broadcastable to the writes."""
    value, write = acts[key], acts["write"]
    if key == "write":
        return value
    if write.dim() == 4:  # S6
        return value if key == "A_bar" else value[:, :, None]
    heads = write.shape[2]
    if key == "A_bar":
        return value[..., None, None]
    return value[:, :, torch.arange(heads) // (heads // value.shape[2])][:, :, :, None]


class TestMeasured:
    def test_as_cuts_measure_them(self, model, data) -> None:
        """Two ways to run an edge: among a circuit's, and as a change of the scan alone."""
        measured = exact_effects(model, data[:2], **TOKENS)
        table = token_edges(model, data[:2], exact=True, controls=True).table
        for layer in range(3):
            writes, controls = inside(measured, layer)
            rows = table[table.layer == layer]
            assert len(rows) == 210 + 20 == len(writes) + len(controls)
            for row in rows.itertuples():
                score = controls[row.target] if row.source < 0 else writes[row.source, row.target]
                assert score == pytest.approx(row.score, abs=2e-4)
        assert table.score[table.source < 0].abs().max() > 1e-2

    def test_estimates_agree_on_tiny(self, tiny) -> None:
        """Spearman's correlation over what is not 0, with one step at the clean run, and with five."""
        data = IOIDataset.generate(tiny.tokenizer, 2)
        given = {"layers": [1, 4], "controls": True}
        measured = token_edges(tiny, data, exact=True, **given).table
        found = {
            steps: token_edges(tiny, data, steps=steps, **given).table.assign(exact=measured.score) for steps in (1, 5)
        }
        for steps, least in ((1, 0.9), (5, 0.7)):
            for of_controls in (False, True):
                some = found[steps][(measured.source < 0) == of_controls]
                some = some[some.exact != 0]
                assert len(some) > 20 and some.score.rank().corr(some.exact.rank()) > least
        assert found[5].score.corr(measured.score) > 0.95


def drawn(draw: int, family: str) -> dict:
    """A planted model's arguments."""
    rng = random.Random(draw)
    layer, tap, seed = rng.randrange(2), rng.choice((0, -1, -2, -3)), rng.randrange(10**6)
    return {"family": family, "n_layers": 2, "layer": layer, "slice": tap, "n_names": 8, "seed": seed}


@pytest.fixture(scope="module", params=[(21, "mamba"), (22, "mamba"), (23, "mamba2"), (24, "mamba2")], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[MambaModel, IOIDataset, set]:
    """A planted model, pairs, and the writes that matter in it."""
    model = planted(**drawn(*request.param))
    layer, last = model.planted.layer, model.planted.written_positions[0]
    truth = {(f"{layer}.write[{s}]", f"{layer}.ssm", last) for s in model.planted.arrival_positions}
    return model, IOIDataset.generate(model.tokenizer, 10), truth


class TestPlanted:
    """The five names' writes into the last position of the planted layer, and no others, by every way."""

    def test_scored(self, case) -> None:
        model, data, truth = case
        into = {edge: score for edge, score in scores_of(eap(model, data, **TOKENS)).items() if edge[1].endswith("ssm")}
        assert all(into.pop(edge) < -0.05 for edge in truth) and max(map(abs, into.values())) < 1e-3

    def test_measured(self, case) -> None:
        model, data, truth = case
        data, known = data[:3], model.planted
        differs = (data.clean_tokens != data.corrupt_tokens).float().mean(0)
        measured = scores_of(exact_effects(model, data, **TOKENS))
        into = {edge: score for edge, score in measured.items() if edge[1].endswith("ssm")}
        for edge in sorted(truth):
            at = int(edge[0].split("[")[1][:-1]) + known.slice
            assert into.pop(edge) == pytest.approx(-differs[at].item(), abs=1e-3)  # each row with another name there
        assert differs.sum() > 0 and max(map(abs, into.values())) < 1e-3

    def test_searched_and_judged(self, case) -> None:
        """The circuit of what is planted does the task alone, and ACDC and the scores find it."""
        model, data, truth = case
        known, last = model.planted, model.planted.written_positions[0]
        node = str(known.layer)
        planted_edges = {*truth, (f"{node}.ssm", node, last), (node, "output", last)}
        for at, arrives in zip(known.name_positions, known.arrival_positions, strict=True):
            planted_edges |= {("embed", node, at), (node, f"{node}.conv[{known.slice}]", arrives)}
        circuit = Circuit.of(model, planted_edges)
        assert circuit.ssm == "tokens" and len(circuit) == 17
        alone = evaluate(model, data, circuit)
        assert alone.accuracy == 1 and alone.nld == pytest.approx(1, abs=1e-3) and alone.random.nld < 0.9
        for edge in sorted(truth)[:2]:
            assert evaluate(model, data, circuit.without([edge])).nld < alone.nld - 0.05
        start = Circuit.of(model, Graph(model.n_layers, length=20).edges())
        found = acdc(model, data, start, threshold=1e-2, ssm="tokens")
        assert set(found.edges) == planted_edges and found.ssm == found.meta["ssm"] == "tokens"
        scores = eap(model, data, **TOKENS)
        smallest = minimal_circuit(model, data, scores, 0.99)
        assert set(smallest.edges) <= planted_edges and truth & set(smallest.edges)


def test_whole_empty_and_between(model, data, tmp_path) -> None:
    graph = Graph(3, True, 20, "tokens").on(model)
    for edges, nld in ((graph.edges(), 1), ((), 0)):
        found = evaluate(model, data, Circuit(edges, 3, True, 20, ssm="tokens"), absolute=False)
        assert found.nld == pytest.approx(nld, abs=1e-4) and found.n_edges == len(edges)
    scores = eap(model, data, steps=2, **TOKENS)
    assert rank_correlation(scores, scores) == pytest.approx(1)
    curve = faithfulness(model, data, scores, [0.5, 1.0]).table
    assert curve.faithfulness[curve.fraction == 1].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    circuit = top_k(scores, len(graph) // 2)
    assert Circuit.load(circuit.save(tmp_path / "circuit.json")).edges == circuit.edges
    near = layer_view(circuit, 1)
    assert near.ssm == "tokens" and 0 < len(near) < len(circuit)
    assert '"1.write[' in to_dot(circuit)


def test_sharing_sources() -> None:
    """Targets whose sources are the same up to them share a scan; those that nothing is cut from have none."""
    writes, controls = torch.ones(1, 6, 6), torch.ones(1, 6)
    assert shared_sources(writes, controls)[1] == {}
    writes[0, 2, 4:] = 0
    kinds, targets = shared_sources(writes, controls)
    assert targets == {5: 0, 4: 0} and kinds[0, 0].tolist() == [1, 1, 0, 1, 1, 1]
    writes[0, 0, 5] = 0
    assert sorted(shared_sources(writes, controls)[1].items()) == [(4, 1), (5, 0)]
    controls[0, 3] = 0
    kinds, targets = shared_sources(writes, controls)
    assert targets == {5: 0, 4: 1, 3: 2} and kinds[2, 0].tolist() == [1] * 6


def test_nothing_overflows() -> None:
    from mamba_ioi.trace.tokens import controls_effects, exchanged

    ones = torch.ones(1, 30, 1, 3)
    scan = Units(torch.full((1, 30, 2), 1e4), -torch.ones(2, 3), ones, ones, torch.ones(1, 30, 2, 1))
    y = torch.zeros(1, 30, 2, 1)
    writes, controls = torch.zeros(1, 30, 30), torch.zeros(1, 30)
    assert torch.equal(exchanged(y, scan, scan, writes, controls, None), torch.full_like(y, 3e4))
    assert torch.equal(controls_effects(scan, scan, torch.ones_like(y), None), torch.zeros(30))


def test_refused(model, data) -> None:
    for given, sentence in (
        ({"ssm": "tokens"}, "fine=True and positional=True"),
        ({"ssm": "tokens", "fine": True, "positional": True, "marks": ["n1"]}, "without marks"),
        ({"ssm": "states", "fine": True}, "ssm='conv' or 'tokens'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            eap(model, data, **given)
    coarse = Circuit.of(model, Graph(3).edges())
    with pytest.raises(ValueError, match="give a length"):
        acdc(model, data, coarse, ssm="tokens")
    with pytest.raises(ValueError, match="give a length"):
        exact_effects(model, data, fine=True, ssm="tokens")
    plain = Circuit(Graph(3, True, 20).edges(), 3, True, 20)
    with pytest.raises(ValueError, match="ssm='conv', and other edges into its SSMs than ssm='tokens'"):
        evaluate(model, data, plain, ssm="tokens")
