"""Token flow: on planted circuits the names' edges alone, and each number by runs written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from mamba_ioi import IOIDataset, PromptPairs, load_model, planted
from mamba_ioi.circuits import token_flow
from mamba_ioi.circuits.token_flow import rectangles
from mamba_ioi.report import judge

from .test_token_to_token import LAYER, MODELS, by_hand, cut_edits, logits_by_hand, pair_mask


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize(("layer", "slice"), [(1, -1), (2, -3), (1, 0)])
def test_planted(family, layer, slice):
    """The changed name goes through one tap of the planted layer, and one write to the end; nothing goes elsewhere."""
    model = planted(n_layers=3, layer=layer, slice=slice, n_names=8, family=family, seed=layer)
    data = IOIDataset.generate(model.tokenizer, 10)
    result = token_flow(model, data, edges=4, layers=3, progress=False)
    assert result.meta["arguments"]["layer"] == layer
    names = set()
    for corruption, table in result.table.groupby("corruption"):
        rows = data.select(corruption=corruption)
        (name,) = (rows.clean_tokens != rows.corrupt_tokens).any(0).nonzero()[:, 0].tolist()
        names.add(name)
        right = {("scan", name - slice, 19)} | ({("conv", name, name - slice)} if slice else set())
        for row in table[table.part == "edge"].itertuples():
            moves = row.layer == layer and (row.way, row.source, row.target) in right
            assert row.effect == pytest.approx(float(moves), abs=1e-3)
            assert row.estimate == pytest.approx(float(moves), abs=0.15)
            right -= {(row.way, row.source, row.target)} if moves else set()
        assert not right
        for row in table[table.part != "edge"].itertuples():
            moves = row.part == "layer" and row.layer == layer and (row.way == "scan" or slice < 0)
            assert row.effect == pytest.approx(float(moves), abs=1e-3)
        assert table.source_label[table.source == name].str.contains("->").all()
    assert len(names) > 2
    (claim,) = (one for one in judge({"flow": result}) if one.key == "exchange")
    assert claim.findings[0].holds is True
    assert f"moves the answer 1.000 of the way, and {1 if slice else 0}.000 by its conv" in claim.findings[0].sentence
    assert result.plot().axes


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_by_hand(family):
    """Each measured number, in float64: single edges, layers, and the layers before and after one."""
    model = MODELS[family]
    exact = copy.deepcopy(model._module).double()
    ids, source = (torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    rows, one, other = torch.arange(3), torch.arange(3) + 1, torch.arange(3) + 4
    pairs = PromptPairs(clean_tokens=ids, corrupt_tokens=source, answers=one, corrupt_answers=other)
    result = token_flow(model, pairs, LAYER, edges=6, layers=3, metric="logit_diff", progress=False)
    there = [by_hand(exact, source, layer) for layer in range(3)]
    plain = logits_by_hand(exact, ids, {})[:, -1]
    nowhere, later = pair_mask([], []), torch.ones(9, 9).tril(-1).bool().expand(3, 9, 9)
    assert list(result.table.columns[:6]) == ["group", "part", "layer", "way", "source", "target"]
    assert result.table.part.value_counts().to_dict() == {"edge": 6, "layer": 6, "before": 3, "after": 3}
    for row in result.table.itertuples():
        layers = {"before": [0], "after": [2]}.get(row.part, [row.layer])
        mask = pair_mask([row.source], [row.target]) if row.part == "edge" else later
        edits = {}
        for layer in layers:
            write, taps = there[layer]["write"], there[layer]["conv_slice"]
            by_scan = cut_edits(layer, mask if row.way != "conv" else nowhere, write)
            by_conv = cut_edits(layer, mask if row.way != "scan" else nowhere, write, taps)
            edits |= by_scan | {key: edit for key, edit in by_conv.items() if key[0] == "conv_slice"}
        logits = logits_by_hand(exact, ids, edits)[:, -1]
        lost = (plain - logits)[rows, one] - (plain - logits)[rows, other]
        assert row.effect == pytest.approx(lost.mean().item(), abs=2e-5), row
        assert row.low <= row.effect <= row.high and row.n == 3


def test_estimates_of_many_edges_are_sums():
    """Those of windows are sums over their layers; edges that are measured are the first by estimate."""
    model = load_model("tiny")
    data = IOIDataset.generate(model.tokenizer, 2, corruptions=["ABC AB C -> ABD AB D"])
    few, more = (token_flow(model, data, 2, edges=n, layers=1, steps=2, progress=False).table for n in (3, 200))
    edges = more[more.part == "edge"]
    assert edges.estimate.abs().is_monotonic_decreasing and few.estimate[:3].tolist() == edges.estimate[:3].tolist()
    assert few[few.part == "layer"].effect.notna().sum() == 4  # the one that is estimated to matter most, and layer 2
    by_layer = more[more.part == "layer"].set_index(["layer", "way"]).estimate
    windows = more.set_index(["part", "way"]).estimate
    assert windows["before", "conv"].item() == pytest.approx(by_layer[0, "conv"] + by_layer[1, "conv"])
    assert windows["after", "scan"].item() == pytest.approx(sum(by_layer[i, "scan"] for i in (3, 4, 5)))
    assert edges.estimate.corr(edges.effect) > 0.95


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0, 2), (3, 12), (5, 13), (0, 20)])
def test_rectangles(first, stop):
    found = [(s, t) for sources, targets in rectangles(first, stop) for s in sources for t in targets]
    assert sorted(found) == [(s, t) for s in range(first, stop) for t in range(s + 1, stop)]


def test_refused():
    model = load_model("tiny")
    data = IOIDataset.generate(model.tokenizer, 2)
    for given, sentence in (
        ({"layer": 6}, "layers are whole numbers from 0 to 5"),
        ({"edges": 0}, "edges must be a whole number of at least 1"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            token_flow(model, data, progress=False, **given)
    with pytest.raises(ValueError, match="token_flow needs prompts whose marks and last token stand at the same"):
        token_flow(model, IOIDataset.generate(model.tokenizer, 8, templates="all"), progress=False)
