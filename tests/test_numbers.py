"""Numbers of numpy and torch are taken wherever Python's are; bools are no numbers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from mamba_ioi import IOIDataset, Patch, cache, load_model, planted, run
from mamba_ioi.checks import integers, real_number, scalar, whole_number
from mamba_ioi.circuits import Circuit, Graph, acdc, eap, evaluate, faithfulness, minimal_circuit, top_k
from mamba_ioi.experiments import conv_slices, cross_talk, name_steering, resample_ablation, state_similarity
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import wrap
from mamba_ioi.result import Result, bootstrap_interval

from .conftest import random_mamba

pytestmark = pytest.mark.untyped

WHOLE = [np.int64, np.int32, np.uint8, np.array, torch.tensor]
BOOLS = [True, np.True_, np.array(True), torch.tensor(True)]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def data(tiny) -> IOIDataset:
    return IOIDataset.generate(tiny.tokenizer, 2, symmetric=False)


class TestChecks:
    @pytest.mark.parametrize("kind", WHOLE)
    def test_whole_numbers(self, kind):
        found = whole_number(kind(7), "n", least=0)
        assert found == 7 and type(found) is int
        assert [type(one) for one in integers(kind(7))] == [int]
        assert integers([kind(7), 3, kind(1)]) == [7, 3, 1]

    @pytest.mark.parametrize("values", [np.array([3, 1]), torch.tensor([3, 1]), (3, 1), [np.int8(3), np.array(1)]])
    def test_lists(self, values):
        assert integers(values) == [3, 1]

    @pytest.mark.parametrize("wrong", [*BOOLS, 1.0, np.float64(1), np.array(1.0), "1", None, np.array([1, 2]), 1j])
    def test_what_is_no_whole_number(self, wrong):
        with pytest.raises(ValueError, match="n must be a whole number of at least 0"):
            whole_number(wrong, "n", least=0)
        with pytest.raises(ValueError, match="positions are integers"):
            integers([0, wrong])

    @pytest.mark.parametrize("kind", [float, np.float32, np.float64, np.array, torch.tensor])
    def test_real_numbers(self, kind):
        assert real_number(kind(0.5)) == 0.5 and type(scalar(kind(0.5))) in (float, np.float64)
        assert all(real_number(wrong) is None for wrong in (*BOOLS, "1", None, 1j, [1.0], np.array([1.0])))


class TestPatches:
    """At numpy's numbers and arrays, as at Python's."""

    @pytest.mark.parametrize("kind", WHOLE)
    @pytest.mark.parametrize("site", ["h", "conv", "out_proj", "resid_post"])
    def test_numbers(self, small, tokens, kind, site):
        expected = run(small, tokens, [Patch(site, 1, 0.5, [2, 4])])
        for value in (np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5)):
            for positions in ([kind(2), kind(4)], np.array([2, 4]), torch.tensor([2, 4])):
                assert torch.equal(run(small, tokens, [Patch(site, kind(1), value, positions)]), expected)
        assert torch.equal(
            run(small, tokens, [Patch(site, 1, np.int64(2), kind(3))]), run(small, tokens, [Patch(site, 1, 2.0, 3)])
        )

    @pytest.mark.parametrize("site", ["h", "conv", "resid_post"])
    def test_arrays(self, small, tokens, site):
        there = cache(small, tokens.flip(0), [(site, np.int64(1))])[site, 1][:, [2, 4]]
        expected = run(small, tokens, [Patch(site, 1, there, [2, 4])])
        assert not torch.allclose(expected, run(small, tokens), atol=1e-3)
        array = there.numpy()
        reversed_twice = np.ascontiguousarray(array[::-1])[::-1]
        for value in (array, array.astype(np.float64), reversed_twice, array.astype(">f4")):
            assert torch.equal(run(small, tokens, [Patch(site, 1, value, [2, 4])]), expected)

    def test_slices(self, small, tokens):
        expected = run(small, tokens, [Patch("conv_slice", 1, 0.5, [3], slice=-1)])
        for kind in (np.int64, np.array, torch.tensor):
            assert torch.equal(run(small, tokens, [Patch("conv_slice", 1, 0.5, [3], slice=kind(-1))]), expected)

    @pytest.mark.parametrize("wrong", [*BOOLS, torch.tensor([True]), 1j, "0", None, np.array("a"), np.array([None])])
    def test_what_is_no_value(self, small, tokens, wrong):
        with pytest.raises(ValueError, match="a patch's value is a real tensor, a number or a callable, not"):
            run(small, tokens, [Patch("conv", 1, wrong, [2])])

    @pytest.mark.parametrize("wrong", BOOLS)
    def test_bools(self, small, tokens, wrong):
        for patch in (
            Patch("conv", wrong, 0.0),
            Patch("conv", 1, 0.0, [wrong]),
            Patch("conv_slice", 1, 0.0, [2], wrong),
        ):
            with pytest.raises(ValueError, match=r"integer|slices are"):
                run(small, tokens, [patch])

    @pytest.mark.parametrize("value", [0.1, np.float64(0.1), np.array(0.1)])
    def test_numbers_are_exact_in_double_precision(self, tokens, value):
        """0.1 is not rounded to float32 on its way: written by hand, and read back where it was put."""
        model = wrap(random_mamba(dtype=torch.float64), None, model_id="double")
        exact = torch.tensor(0.1, dtype=torch.float64)
        for site in ("conv", "h", "resid_post"):
            held = cache(model, tokens, [(site, 1)], patches=[Patch(site, 1, value, [2])])[site, 1][:, 2]
            assert (held == exact).all()
        with torch.no_grad(), model.trace(tokens):
            model.layers[1].mixer.conv = value
            conv = model.layers[1].mixer.conv.save()
        assert (conv == exact).all()
        readout = Readout(
            tokens[:, :2], torch.full((4,), 8), *(torch.zeros(4, dtype=torch.long),) * 2, torch.arange(2).expand(4, 2)
        )
        for site in ("conv", "h", "resid_post"):
            found = sweep(model, tokens, [[Patch(site, 1, value, [2])]], readout)
            by_hand = run(model, tokens, [Patch(site, 1, exact.expand(4, 1, *([1] * (2 if site == "h" else 1))), [2])])
            torch.testing.assert_close(found[0].double(), by_hand.gather(1, tokens[:, :2]), rtol=0, atol=1e-12)


class TestExperiments:
    """The tables under numpy's numbers are those under Python's, and the results can be saved."""

    @pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
    def test_layers_positions_and_slices(self, tiny, data, kind, tmp_path):
        quiet = {"progress": False}
        for call in (
            lambda n: resample_ablation(tiny, data, layers=[n(1), n(2)], positions=n(6), **quiet),
            lambda n: resample_ablation(tiny, data, layers=n(1), positions=[n(6)], site="h", **quiet),
            lambda n: conv_slices(tiny, data, n(2), slices=[n(-1), n(0)], positions=[n(6)], **quiet),
            lambda n: conv_slices(tiny, data, n(2), slices=n(-1), positions=n(6), **quiet),
            lambda n: state_similarity(tiny, data.clean_text[:1], n(2), **quiet),
            lambda n: name_steering(tiny, n(2), n(200), n_test=n(2), seed=n(3), offset=n(1), **quiet),
        ):
            found, expected = call(kind), call(int)
            assert found.table.equals(expected.table)
            assert found.meta["arguments"] == expected.meta["arguments"]
            found.save(tmp_path)

    def test_targets(self, tiny, data):
        for target in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
            found = cross_talk(tiny, data[:1], target=target, progress=False)
            assert found.table.equals(cross_talk(tiny, data[:1], target=0.5, progress=False).table)
        with pytest.raises(ValueError, match="target is an accuracy"):
            cross_talk(tiny, data[:1], target=True)

    @pytest.mark.parametrize("kind", [np.int64, np.array])
    def test_data_and_planted(self, tiny, kind):
        found = IOIDataset.generate(tiny.tokenizer, kind(3), seed=kind(5))
        assert torch.equal(found.clean_tokens, IOIDataset.generate(tiny.tokenizer, 3, seed=5).clean_tokens)
        model, expected = planted(kind(3), kind(1), kind(-2), kind(8), kind(4)), planted(3, 1, -2, 8, 4)
        for one, other in zip(model._module.parameters(), expected._module.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_memory(self, tiny, data):
        tiny.memory = np.int64(10**8)
        try:
            resample_ablation(tiny, data, layers=1, positions=6, progress=False)
            tiny.memory = np.True_
            with pytest.raises(ValueError, match="memory is a positive whole number"):
                resample_ablation(tiny, data, layers=1, positions=6, progress=False)
        finally:
            tiny.memory = None


class TestCircuits:
    @pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
    def test_graphs_and_files(self, kind, tmp_path):
        assert Graph(kind(3), False, kind(4)) == Graph(3, False, 4)
        circuit = Circuit((("embed", kind(1), kind(2)), (kind(1), "output", kind(3))), kind(3), length=kind(4))
        assert circuit.edges == (("embed", "1", 2), ("1", "output", 3))
        assert circuit.edges == Circuit((("embed", "1", 2), ("1", "output", 3)), 3, length=4).edges
        assert circuit.only_last_position(kind(1)).edges == circuit.edges
        assert Circuit.load(circuit.save(tmp_path / "circuit.json")).edges == circuit.edges
        with pytest.raises(ValueError, match="is not in"):
            Circuit((("embed", "1", True),), 3, length=4)
        with pytest.raises(ValueError, match="at least one layer"):
            Graph(np.True_)

    def test_searches(self, tiny, data, tmp_path):
        scores = eap(tiny, data, steps=np.int64(2), batch_rows=np.int64(2))
        assert scores.table.equals(eap(tiny, data, steps=2, batch_rows=2).table)
        scores.save(tmp_path / "scores")
        assert top_k(scores, np.array(3)).edges == top_k(scores, 3).edges
        found = minimal_circuit(tiny, data, scores, np.float32(0.5), seed=np.int64(1), by="random")
        assert found.edges == minimal_circuit(tiny, data, scores, 0.5, seed=1, by="random").edges
        kept = acdc(tiny, data, found, threshold=np.array(1e-4), fine=False)
        assert kept.edges == acdc(tiny, data, found, threshold=1e-4, fine=False).edges
        kept.save(tmp_path / "circuit.json")
        assert evaluate(tiny, data, kept, random_seed=np.int64(3)) == evaluate(tiny, data, kept, random_seed=3)
        curve = faithfulness(tiny, data, scores, fractions=np.array([0.5, 1.0], np.float32), seed=np.int64(1))
        assert curve.table.equals(faithfulness(tiny, data, scores, fractions=[0.5, 1.0], seed=1).table)
        curve.save(tmp_path / "curve")


def test_results_hold_numbers_of_numpy(tmp_path):
    arguments = {"n": np.int64(3), "share": np.float32(0.5), "all": np.arange(3), "t": torch.tensor([1.5])}
    Result.create("x", pd.DataFrame({"a": [1]}), model=None, arguments=arguments, seed=np.int8(2)).save(tmp_path)
    stored = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert stored["arguments"] == {"n": 3, "share": 0.5, "all": [0, 1, 2], "t": [1.5]} and stored["seed"] == 2


def test_bootstrap_intervals():
    values = np.arange(9.0)
    expected = bootstrap_interval(values, n_resamples=50, level=0.5)
    assert bootstrap_interval(values, n_resamples=np.array(50), level=np.float32(0.5), seed=np.int64(0)) == expected
    with pytest.raises(ValueError, match="n_resamples"):
        bootstrap_interval(values, n_resamples=True)
