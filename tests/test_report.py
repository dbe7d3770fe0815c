"""The report: its sentences follow from the tables, both ways; its page is whole, loads nothing, and is readable."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mamba_ioi import reference
from mamba_ioi.catalogue import CATALOGUE
from mamba_ioi.cli import main
from mamba_ioi.report import QUESTIONS, Claim, Finding, judge, write_report
from mamba_ioi.report import opening as openings
from mamba_ioi.report.evidence import Number, shown
from mamba_ioi.reproduce.run import redraw
from mamba_ioi.result import Result

from . import report_examples as made
from .browser import BROWSER, body_data, chromium
from .report_examples import LARGE, as_the_paper_says, store

VERDICTS = ["holds", "holds in part", "does not hold", "not measured"]
STEERED, WEAK = (lambda method, source, target: 0.98), (lambda method, source, target: 0.3)


def finding(
    claim: str, figure: str, results: dict[str, Result], paper: dict | None = None, bottleneck: int | None = None
) -> Finding:
    found = next(one for one in judge(results, paper, bottleneck) if one.key == claim)
    return next(one for one in found.findings if one.figure == figure)


def one(result: Result) -> dict[str, Result]:
    return {result.meta["request"]["figure"]: result}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every figure with its result, and the report."""
    folder = store(tmp_path_factory.mktemp("stored") / "out", as_the_paper_says())
    write_report(folder)
    return folder


@pytest.fixture
def whole(stored: Path, tmp_path: Path) -> Path:
    """A copy of `stored` to write into, without the report."""
    return shutil.copytree(stored, tmp_path / "out", ignore=shutil.ignore_patterns("report.*"))


# --- the rules --------------------------------------------------------------------------------------------------------


def test_every_figure_is_named_read_and_judged_or_a_diagram() -> None:
    assert list(CATALOGUE) == list(as_the_paper_says())
    assert all(row.label and row.reading and row.shows for row in CATALOGUE.values())
    judged = {figure for question in QUESTIONS for figure, _ in (*question.deciding, *question.telling)}
    assert set(CATALOGUE) - judged == {"fig2", "fig3", "fig12", "knockout"}


@pytest.mark.parametrize("model", ["tiny", LARGE])
def test_results_as_in_the_paper_bear_every_claim_out(model: str) -> None:
    for claim in judge(as_the_paper_says(model)):
        assert claim.verdict == "holds", (claim.title, claim.grounds)
        assert claim.missing == () and "against" not in claim.grounds


@pytest.mark.parametrize(
    ("claim", "result", "holds", "said"),
    [
        ("task", made.fig5({-1: 0.9, 0: 0.1, 1: 0.5}), True, "names in 0.900 of the prompts"),
        ("task", made.fig5({-1: 0.4, 0: 0.1, 1: 0.5}), False, "a task that the model does not do"),
        (
            "exchange",
            made.flow(0.9, 0.04),
            True,
            "moves the answer 0.900 of the way, and 0.900 by its conv, 0.040 in",
        ),
        ("exchange", made.flow(0.9, 0.04), True, "layer 1, by the scan, from 'pos4' to 'out' (0.450; CAB"),
        ("exchange", made.flow(0.9, 0.3), False, "0.300 in all layers before it"),
        ("exchange", made.flow(0.4, 0.04), False, "moves the answer 0.400 of the way"),
        ("exchange", made.flow(0.9, 0.04, layer=0), None, "0.050 in all layers after it"),
        ("bottleneck", made.fig4({0: 0.9, 1: 0.8, 2: 0.1}), True, "Layer 1 stands out"),
        ("later", made.lens({-1: 0.0, 0: 1.0, 1: 9.0, 2: 10.0}), None, "after layer 1; the answer is first in the"),
        ("later", made.lens({-1: 0.0, 0: -1.0}), None, "the mean logit difference is"),
        ("bottleneck", made.fig4({0: 0.9, 1: 0.8, 2: 0.5}), False, "No layer stands out; layer 1 comes first"),
        ("bottleneck", made.fig4({0: 0.9, 1: 0.3, 2: 0.1}), False, "No layer stands out"),
        ("bottleneck", made.fig4({0: 0.9}), None, "no layer besides layer 0"),
        ("bottleneck", made.fig4({0: 0.2, 1: 0.8}), True, "Layer 1 stands out"),
        ("bottleneck", made.fig4_marks({0: 0.9, 1: 0.8, 2: 0.1}), True, "Layer 1 stands out"),
        ("bottleneck", made.fig4_marks({0: 0.9, 1: 0.8, 2: 0.5}), False, "No layer stands out; layer 1 comes first"),
        ("bottleneck", made.fig5({-1: 0.9, 0: 0.1, 1: 0.5, 2: 0.8}), True, "can spare layer 1 least"),
        ("bottleneck", made.fig5({-1: 0.9, 0: 0.1, 1: 0.5, 2: 0.52}), False, "does not set layer 1 apart"),
        ("bottleneck", made.fig5({-1: 0.9, 0: 0.1, 1: 0.88, 2: 0.9}), False, "does not set layer 1 apart"),
        ("bottleneck", made.fig5({-1: 0.9, 0: 0.1}), None, "no layer besides layer 0"),
        ("bottleneck", made.greedy([1.0, 0.98, 0.96, 0.5], 2), None, "2 of 3 layers can go"),
        ("bottleneck", made.fig6([[1], [1, 2], [2, 1]]), True, "Layer 1 is in 3 of 3 minimal sets"),
        ("bottleneck", made.fig6([[1], [1, 2], [0, 1], [2]]), False, "Layer 1 is in 3 of 4 minimal sets"),
        ("bottleneck", made.fig6([[1], [1, 2], [0, 2]], unreached=[2]), True, "1 kind of prompts with no such set"),
        ("bottleneck", made.fig6([[1], [1, 2]], unreached=[0, 1]), None, "There are no minimal sets"),
        (
            "shift",
            made.fig8({-3: 0.1, -2: 0.0, -1: 0.8, 0: 0.1}),
            True,
            "through tap −1 (0.802 of the way) of its conv",
        ),
        ("shift", made.fig8({-3: 0.5, -2: 0.0, -1: 0.4, 0: 0.0}), False, "taps −3 (0.502 of the way) and −1 (0.402 of"),
        ("shift", made.fig8({-3: 0.5, -2: 0.0, -1: 0.4, 0: 0.0}), False, "arrives +1 and +3 from its own token"),
        ("shift", made.fig8({-1: 0.8, 0: 0.1}, shift=1), False, ": there it reads +1 from a name's own token, what e"),
        ("shift", made.fig8({-1: 0.0, 0: 0.8}), False, "through tap 0 (0.802"),
        ("shift", made.fig8({-1: 0.05, 0: 0.01}), False, "names do not come in there"),
        (
            "shift",
            made.fig7({0: 0.2, 1: 0.7}),
            None,
            "+1 writes what is most like later states (mean cosine 0.7",
        ),
        ("shift", made.fig7({3: 0.7}), None, "from a name on, +3 writes what"),
        ("linear", made.fig9(STEERED), True, "one win in 0.980 of the tests within slots 1 to 3"),
        ("linear", made.fig9(WEAK), False, "Steering at that one position is weak"),
        ("linear", made.fig9(lambda *_: 0.8), False, "That is less than 0.95"),
        ("linear", made.fig9(STEERED, n=0), None, "more pairs are needed"),
        ("linear", made.plane(), None, "hold 0.420 and 0.180 of the variance"),
        ("last", made.sec44((0.86, 0.87), (0.84, 0.86), (40, 30)), True, "Without the 10 edges that leave layer 1"),
        ("last", made.sec44((0.86, 0.87), (0.84, 0.86), (29, 28)), True, "Without the 1 edge that leaves layer 1 be"),
        ("last", made.sec44((0.86, 0.87), (0.60, 0.86), (40, 30)), False, "from 0.860 to 0.600"),
        ("last", made.sec44((0.86, 0.87), (0.86, 0.80), (40, 30)), False, "from 0.870 to 0.800"),
        ("last", made.sec44((0.86, 0.87), (0.86, 0.87), (40, 40)), True, "there is nothing to cut"),
        (
            "last",
            made.sec44((0.63, 0.63), (0.63, 0.63), (4, 4)),
            None,
            "misses the accuracy of 0.85, this decides nothing",
        ),
        ("circuit", made.circuit("appd1", 20, 100), True, "20 of 100 edges (0.200)"),
        ("circuit", made.circuit("appd1", 60, 100), False, "it is more than half of the graph"),
        ("circuit", made.circuit("appd3", accuracy=0.7), False, "misses the accuracy of 0.85"),
        ("circuit", made.circuit("appd3", accuracy=0.83), True, "accuracy of 0.830"),
        ("circuit", made.circuit("appd2", random=0.85), False, "not clearly better than the random one"),
    ],
)
def test_one_figure_alone(claim: str, result: Result, holds: bool | None, said: str) -> None:
    found = finding(claim, result.meta["request"]["figure"], one(result))
    assert found.holds is holds and said in found.sentence, found.sentence


@pytest.mark.parametrize(
    ("kept", "holds", "said"),
    [
        (
            {"n1": 0.5, "n2": 0.7, "n3": 0.9},
            True,
            "reads each slot's name right in 0.500 for n1, 0.700 for n2 and 0.900",
        ),
        ({"n1": 0.3, "n2": 0.34, "n3": 0.99}, False, "with shuffled labels in at most 0.010"),
    ],
)
def test_whether_names_are_kept_with_their_slots(kept: dict[str, float], holds: bool, said: str) -> None:
    results = {
        "probe": made.probes(kept),
        "fig9": made.fig9(lambda method, source, target: 1.0 if source == target else 0.4),
    }
    (claim,) = (one for one in judge(results, bottleneck=1) if one.key == "slots")
    found = {one.figure: one for one in claim.findings}
    assert found["probe"].holds is holds and said in found["probe"].sentence, found["probe"].sentence
    assert "a token after the name it is right in 0.970, 0.970 and 0.970" in found["probe"].sentence
    assert found["fig9"].holds is None
    assert "wins in 1.000 of the tests, by that of another of the first three slots in 0.400" in found["fig9"].sentence
    (claim,) = (one for one in judge({"probe": made.probes(kept, places=["last"])}, bottleneck=1) if one.key == "slots")
    assert claim.verdict == "not measured" and "was not looked at n4-1" in claim.findings[0].sentence


@pytest.mark.parametrize(
    ("accuracies", "random", "holds", "said"),
    [
        ({0: 0.0, 16: 0.9, 32: 1.0, 64: 1.0}, 0.1, True, "Of 64 features that are active, 16 alone have, on held-out"),
        ({0: 0.0, 16: 0.5, 32: 0.8, 64: 1.0}, 0.1, False, "32 alone have"),
        ({0: 0.0, 16: 0.9, 32: 1.0, 64: 1.0}, 0.97, False, "as many random ones have 0.970"),
        ({64: 1.0}, 0.1, None, "No number of features up to half of them was kept"),
    ],
)
def test_circuits_of_features(accuracies: dict[int, float], random: float, holds: bool | None, said: str) -> None:
    (claim,) = (
        one
        for one in judge({"features_kept": made.features_kept(accuracies, random, 1)}, bottleneck=1)
        if one.key == "dictionary"
    )
    (found,) = claim.findings
    assert found.holds is holds and said in found.sentence, found.sentence


def test_features_and_their_edges() -> None:
    results = {"features": made.features(1), "features_edges": made.features_edges(1)}
    (claim,) = (one for one in judge(results, bottleneck=1) if one.key == "dictionary")
    effects, edges = claim.findings
    assert "with the largest estimates are 7 and 3; what the dictionary leaves unexplained moves" in effects.sentence
    assert effects.numbers[-1].value == pytest.approx(1.6)
    assert "from feature 7 of ssm_input to feature 2 of out_proj: alone it takes it 0.800" in edges.sentence


@pytest.mark.parametrize(
    ("effects", "holds", "said"),
    [
        ({0: 1.0, 1: 6.0, 2: 3.0}, True, "the layers after it write 0.300"),
        ({0: 1.0, 1: 8.5, 2: 0.5}, False, "layer 1 writes 0.850 of it"),
        ({0: 1.0, 1: 9.0}, None, "is the last one"),
        ({0: -1.0, 1: 0.5, 2: 0.1}, None, "there is no answer to share out"),
    ],
)
def test_what_is_written_after_the_bottleneck(effects: dict[int, float], holds: bool | None, said: str) -> None:
    (claim,) = (one for one in judge({"direct": made.direct(effects)}, bottleneck=1) if one.key == "later")
    (found,) = (one for one in claim.findings if one.figure == "direct")
    assert found.holds is holds and said in found.sentence, found.sentence


@pytest.mark.parametrize(
    ("claim", "result", "holds", "said"),
    [
        ("bottleneck", made.fig5({-1: 0.9, 0: 0.1, 1: 0.8, 2: 0.5}), False, "does not set layer 1 apart"),
        ("bottleneck", made.fig6([[2], [2, 1]]), False, "Layer 1 is in 1 of 2"),
        ("shift", made.fig10([0.0, 0.9]), True, "begins to matter +1 from a changed name"),
        (
            "shift",
            made.fig10([0.0, 0.5, 0.5, 0.9]),
            False,
            "begins to matter +1 and +3 from a changed name, in 2 steps",
        ),
        ("shift", made.fig10([0.9]), False, "begins to matter +0"),
        ("shift", made.fig10([0.09]), False, "state hardly matters: resampled, it moves the answer 0.09"),
        ("shift", made.fig10([0.0, 0.2]), False, "0.202 of the way at the last position"),
        ("shift", made.fine({-1: 0.8, 0: 0.1}), True, "ACDC keeps taps 0 (without it NLD falls by 0.100) and −1"),
        ("shift", made.fine({-1: 0.4, -3: 0.5}), False, "ACDC keeps taps −1"),
        ("shift", made.fine({}), False, "ACDC keeps no tap"),
        ("last", made.fig11(0.9, 0.02), True, "at the last position alone"),
        ("last", made.fig11(0.9, 0.3), False, "not there alone"),
        ("last", made.fig11(0.9, -0.3), False, "not there alone"),
        ("last", made.fig11(0.0, 0.0), False, "does not move the answer"),
    ],
)
def test_one_figure_beside_the_bottleneck(claim: str, result: Result, holds: bool, said: str) -> None:
    """These look at the layer that the folder has recorded, layer 1 here."""
    figure = result.meta["request"]["figure"]
    found = finding(claim, figure, one(result), bottleneck=1)
    assert found.holds is holds and said in found.sentence, found.sentence


@pytest.mark.parametrize("figure", ["fig10", "fig11", "appd2"])
def test_without_a_layer_to_look_at_nothing_is_said(figure: str) -> None:
    results = {figure: as_the_paper_says()[figure]}
    claim = {"fig10": "shift", "fig11": "last", "appd2": "shift"}[figure]
    assert finding(claim, figure, results).holds is None
    with_layer = results | {"sec44": as_the_paper_says()["sec44"]}
    assert finding(claim, figure, with_layer).holds is True


def test_another_layer_than_the_bottleneck_decides_nothing() -> None:
    results = as_the_paper_says(LARGE)
    others = {"fig8": made.fig8({-1: 0.8}, 20, LARGE), "fig9": made.fig9(STEERED, 20, LARGE)}
    for claim, figure in (("shift", "fig8"), ("linear", "fig9")):
        for result, holds, beside in ((results[figure], True, figure == "fig9"), (others[figure], None, False)):
            found = finding(claim, figure, results | {figure: result}, reference.numbers(), 39)
            assert found.holds is holds
            assert any(number.paper is not None for number in found.numbers) is beside
            said = "As this looks at layer 20 and the bottleneck found is layer 39, it decides nothing."
            assert (said in found.sentence) is (holds is None)


def test_figure_4_is_held_against_the_recorded_bottleneck() -> None:
    """There is one bottleneck; another layer that comes first in Figure 4 does not take its place."""
    results = one(made.fig4({0: 0.9, 1: 0.3, 2: 0.8})) | one(made.fig11(0.9, 0.02, layer=1))
    found = finding("bottleneck", "fig4", results, bottleneck=1)
    assert found.holds is False
    said = "Layer 2 comes first here, and not the bottleneck, layer 1: resampling layer 1's input at one position moves"
    assert found.sentence.startswith(said)
    assert (
        "layer 2, 0.802 and layer 0, 0.902. Layer 0 set aside, layer 1 leads in 0 of 5 corruptions." in found.sentence
    )
    assert finding("last", "fig11", results, bottleneck=1).holds is True
    assert finding("last", "fig11", results, bottleneck=2).holds is None
    assert finding("bottleneck", "fig4", results, bottleneck=2).holds is True


def test_a_layer_that_leads_in_some_corruptions_only() -> None:
    table = made.fig4({0: 0.9, 1: 0.8, 2: 0.1}).table
    first = table["corruption"] == table["corruption"].iloc[0]
    table.loc[first & (table["layer"] == 2), "effect"] *= 9
    mixed = Result(table, made.fig4({0: 0.9}).meta)
    found = finding("bottleneck", "fig4", {"fig4": mixed})
    assert found.holds is False and "it leads in 4 of 5 corruptions" in found.sentence


def test_labels_that_say_nothing_leave_the_offsets_out() -> None:
    results = {figure: as_the_paper_says()[figure] for figure in ("fig4", "fig8", "fig10")}
    results = {name: Result(one.table.assign(label="x"), one.meta) for name, one in results.items()}
    taps = finding("shift", "fig8", results)
    assert taps.holds is True and "arrives" not in taps.sentence
    states = finding("shift", "fig10", results, bottleneck=1)
    assert states.holds is None and "do not say where a name changes" in states.sentence


def test_verdicts() -> None:
    yes, no, none = (Finding("fig4", holds, "") for holds in (True, False, None))
    for findings, verdict in (((yes, none), 0), ((yes, no), 1), ((no, none), 2), ((none,), 3), ((), 3)):
        assert Claim("k", "t", "p", findings).verdict == VERDICTS[verdict]
    assert Claim("k", "t", "p", (yes, no), ("fig6",)).grounds == (
        "for it: Figure 4; against it: Figure 4; not there: Figure 6"
    )
    assert [claim.verdict for claim in judge({})] == ["not measured"] * len(QUESTIONS)


def test_a_result_of_another_form_loses_its_own_sentence_only() -> None:
    results = as_the_paper_says()
    broken = results["appd1"]
    results["appd1"] = Result(broken.table, broken.meta | {"circuit": "none"})
    claim = judge(results)[-1]
    assert [one.holds for one in claim.findings] == [None, True, True]
    assert "cannot be read (TypeError" in claim.findings[0].sentence


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"ssm": "states"}, "overwriting all states h with the corrupt run's, C and D x staying live."),
        ({"ssm": "conv"}, "resampling the conv's output, and with it x, B, C and delta."),
        ({"ssm": "conv", "direct_step": True}, "resampling the conv's output, and with it x, B and C, delta staying"),
        ({"ssm": "states", "direct_step": True}, "overwriting all states h"),
    ],
)
def test_how_the_edge_into_the_ssm_was_cut(graph: dict, words: str) -> None:
    """A Mamba-2's time step does not come out of its conv."""
    fine = made.fine({-1: 0.8})
    results = as_the_paper_says() | {"appd2": Result(fine.table, fine.meta | {"graph": fine.meta["graph"] | graph})}
    assert f"The edge conv -> ssm was cut by {words}" in finding("circuit", "appd2", results).sentence


def test_numbers_are_the_tables() -> None:
    results = as_the_paper_says()
    claims = {claim.key: claim for claim in judge(results)}
    row = results["fig5"].table.set_index("layer").loc[-1]
    accuracy, probability = claims["task"].findings[0].numbers
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.n) == (
        row.accuracy,
        row.accuracy_low,
        row.accuracy_high,
        row.n,
    )
    assert (probability.value, probability.low, probability.high) == (row.probability, row.low, row.high)
    every = {
        (number.value, number.low, number.high, number.n)
        for claim in claims.values()
        for found in claim.findings
        for number in (*found.numbers, *found.more)
    }
    for figure in ("fig9",):
        table = results[figure].table
        assert set(table[["success", "low", "high", "n"]].itertuples(index=False, name=None)) <= every
    table = results["fig4"].table
    peaks = table[(table["layer"] == 1) & (table["effect"] > 0.5)]
    assert len(peaks) == 5 and set(peaks[["effect", "low", "high", "n"]].itertuples(index=False, name=None)) <= every
    held_out = results["appd3"].meta["circuit"]["held_out"]
    assert (held_out["nld"], held_out["nld_low"], held_out["nld_high"], 200) in every
    for column in ("accuracy", "nld"):
        for row in results["sec44"].table.itertuples():
            ends = (getattr(row, column), getattr(row, f"{column}_low"), getattr(row, f"{column}_high"), 200)
            assert ends in every


def test_numbers_as_written() -> None:
    assert [shown(value) for value in (1, 0.12345, -0.5, -0.0001, float("nan"), None)] == [
        "1",
        "0.123",
        "−0.500",
        "0.000",
        "–",
        "–",
    ]
    assert Number("x", 0.8, 0.75, 0.8512).with_interval == "0.800 [0.750, 0.851]"
    assert [Number("x", value, paper=0.5).difference for value in (0.75, 0.25, 0.5, 0.50001)] == [
        "+0.250",
        "−0.250",
        "0.000",
        "0.000",
    ]
    assert Number("x", 40, paper=39).difference == "+1" and Number("x", 0.5).difference == ""


# --- beside the paper -------------------------------------------------------------------------------------------------


def test_mamba_370m_stands_beside_the_paper() -> None:
    paper = reference.numbers()
    results = as_the_paper_says(LARGE)
    beside = {
        (found.figure, number.what): number
        for claim in judge(results, paper)
        for found in claim.findings
        for number in (*found.numbers, *found.more)
        if number.paper is not None
    }

    def check(figure: str, what: str, here: float, theirs: float) -> None:
        number = beside[figure, what]
        assert number.value == pytest.approx(here) and number.paper == pytest.approx(theirs, abs=5e-4), what
        difference = here - number.paper
        expected = f"{difference:+d}" if isinstance(here, int) else f"{difference:+.3f}"
        expected = {"+0": "0", "+0.000": "0.000", "-0.000": "0.000"}.get(expected, expected)
        assert number.difference.replace("−", "-") == expected, what

    check("fig4", "the layer", 39, 39)
    check("fig5", "accuracy", 0.96, 0.96)
    check("fig5", "probability of the answer", 0.96, 0.83)
    check("fig5", "probability without layer 39", 0.5, 0.450)
    check("fig5", "accuracy without layer 39", 0.5, 0.55)
    check("fig5", "probability without layer 26", 0.9, 0.773)
    check("fig5_greedy", "share of layers that can go", 0.5, 0.5)
    check("fig6", "share of sets with layer 39", 1.0, 1.0)
    check("fig6", "share of sets with layer 2", 0.25, 0.0)
    check("fig6", "share of sets with layer 0", 0.0, 0.15)
    check("fig9", "subtract and add, slot 5's mean into slot 1", 0.6, 0.614)
    check("fig9", "replace, slot 1's mean into slot 5", 0.6, 0.19)
    mean = sum(sum(row[:3]) for row in paper["fig9"]["subtract_add"][:3]) / 9
    check("fig9", "subtract and add, within slots 1 to 3 (mean of 9 cells)", 0.98, mean)
    check("sec44", "whole circuit, accuracy, on the pairs it was found on", 0.85, 0.852)
    check("sec44", "cut circuit, NLD, on the pairs it was found on", 0.87, 0.873)
    check("appd1", "edges of the ranking up to there", 22, 188)
    check("appd1", "edges kept", 20, 181)
    check("appd1", "edges of the graph", 100, 1225)
    check("appd1", "on the pairs it was found on, accuracy", 0.86, 0.8524)
    check("appd2", "edges kept, on a path of kept edges", 19, 364)
    check("appd2", "held out, NLD", 0.8, 0.84)
    check("appd2", "tap −1: fall of NLD", 0.8, 0.814)
    check("appd3", "edges of the graph", 100, 24500)
    check("appd3", "on the pairs it was found on, accuracy", 0.86, 0.852)
    assert beside["fig5", "probability without layer 39"].difference == "+0.050"
    assert beside["fig9", "subtract and add, slot 5's mean into slot 1"].difference == "−0.014"
    assert beside["appd1", "edges kept"].difference == "−161"
    assert not any(what.startswith("held out") for figure, what in beside if figure != "appd2"), (
        "not what the paper has"
    )
    edge = results["appd2"].meta["graph"] | {"ssm": "conv"}
    other = Result(results["appd2"].table, results["appd2"].meta | {"graph": edge})
    said = [found for claim in judge(results | {"appd2": other}, paper) for found in claim.findings]
    found = next(found for found in said if "conv -> ssm was cut" in found.sentence)
    assert "resampling the conv's output" in found.sentence and all(number.paper is None for number in found.numbers)
    assert sum(figure == "fig9" for figure, _ in beside) == 50 + 8


def test_only_mamba_370m_is_set_beside_the_paper(tmp_path: Path) -> None:
    for model in ("state-spaces/mamba-370m-hf", "state-spaces/mamba-370m", "/models/mamba-370m-hf/"):
        assert reference.is_paper_model(model)
    for model in ("tiny", None, "state-spaces/mamba-130m-hf", "me/mamba-370m-tuned"):
        assert not reference.is_paper_model(model)
    few = ("fig4", "fig5", "appd1")
    agreement = [[{"kind": "all", "found": 20, "theirs": 188, "jaccard": 0.0625}]]
    for model, said in ((LARGE, True), ("tiny", False)):
        results = {figure: as_the_paper_says(model)[figure] for figure in few}
        if model == LARGE:
            circuit = results["appd1"]
            results["appd1"] = Result(circuit.table, circuit.meta | {"paper": agreement})
        store(tmp_path / model, results, pictures=False)
        write_report(tmp_path / model)
        for name in ("report.html", "report.md"):
            text = (tmp_path / model / name).read_text()
            assert ("difference" in text) is said and ("0.062" in text) is said


# --- the files --------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """The page's headings, images, ids and links, and whether its elements are closed."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.images: list[dict] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.frames: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "iframe":
            self.frames.append(attributes["srcdoc"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_whole(whole: Path) -> None:
    assert [path.name for path in write_report(whole)] == ["report.md", "report.html"]
    page, text = (whole / "report.html").read_text(), (whole / "report.md").read_text()
    outline = Outline(page)
    assert page.startswith("<!DOCTYPE html>") and '<html lang="en">' in page
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.images) == len(CATALOGUE) and all(len(image["alt"]) > 40 for image in outline.images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in outline.images)
    assert len(set(outline.ids)) == len(outline.ids) and set(CATALOGUE) <= set(outline.ids)
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert len(outline.frames) == 1 and outline.frames[0].startswith("<!DOCTYPE html>")
    assert sorted(re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)) == sorted(
        f"{figure}.png" for figure in CATALOGUE
    )
    for claim in judge(as_the_paper_says()):
        assert f"## {claim.title}\n" in text
        for found in claim.findings:
            assert html.escape(found.sentence, quote=False).replace("'", "&#39;") in page
            assert re.sub(r"\\(.)", r"\1", text).count(found.sentence) >= 1
    assert "mamba-ioi reproduce --model tiny" in page and "2026-01-02T03:04:05+00:00" in page
    assert "not in this report" not in page.lower()


def test_the_page_loads_nothing(stored: Path) -> None:
    page = html.unescape((stored / "report.html").read_text())
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\"' >]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(?<![-\w])(src|href)\s*=\s*[\"'](?!#|data:image/png;base64,)", page)
    assert not re.search(r"url\((?!#)|@import|import\(|fetch\(", page)


def test_the_same_folder_gives_the_same_report(whole: Path, tmp_path: Path) -> None:
    write_report(whole)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("report.*"))
    write_report(copy)
    for name in ("report.html", "report.md"):
        assert (copy / name).read_bytes() == (whole / name).read_bytes()
    assert write_report(whole) == []
    (whole / "report.md").write_text("cut sh")
    assert write_report(whole) == [whole / "report.md"]
    assert [path.name for path in whole.iterdir() if path.name.startswith(".")] == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    results = as_the_paper_says()
    store(tmp_path, {"fig4": results["fig4"]})
    store(tmp_path, {"fig5": results["fig5"]}, pictures=False)
    results["fig8"].save(tmp_path / "results" / "fig8")
    (tmp_path / "results" / "fig8" / "table.parquet").write_bytes(b"PAR1")
    Result(results["sec44"].table.drop(columns="accuracy_low"), results["sec44"].meta).save(
        tmp_path / "results" / "sec44"
    )
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        text = re.sub(r"\\(.)", r"\1", html.unescape((tmp_path / name).read_text()))
        assert "There is no picture fig5.png" in text and "no picture fig4" not in text
        assert "Figure 8: its stored result is damaged and left out" in text
        assert "Section 4.4: its stored result lacks the column accuracy_low" in text
        left = [figure for figure in CATALOGUE if figure not in ("fig4", "fig5")]
        assert f"mamba-ioi reproduce --only {','.join(left)}" in text
        assert all(f"{CATALOGUE[figure].label} ({figure})" in text for figure in left)
        assert "for it: Figure 4, Figure 5; not there: Figure 4 (marks), Figure 6" in text
        assert "Figure 10, Appendix D.2" in text
    with pytest.raises(ValueError, match="holds no results of mamba-ioi reproduce"):
        write_report(tmp_path / "results")


HOSTILE = "</title><script>alert('x')</script><img src=x onerror=alert(1)>`|[a](javascript:alert(1))\n# \udcff\" &amp;"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    readable = HOSTILE.replace("\udcff", "")  # a table's texts are UTF-8; a file's name need not be
    results = {}
    for figure, result in as_the_paper_says().items():
        asked = result.meta["request"] | {"model": HOSTILE, "weights": HOSTILE}
        meta = result.meta | {"model": HOSTILE, "request": asked, "dtype": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        table = result.table
        for column in {"corruption", "label", "template", "label_i", "prompt"} & set(table.columns):
            table = table.assign(**{column: table[column] + readable})
        results[figure] = Result(table, meta | ({"position_labels": [readable] * 20} if figure == "appd3" else {}))
    store(tmp_path, results, pictures=False)
    assert Result.load(tmp_path / "results" / "fig4").meta["model"] == HOSTILE
    write_report(tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    outline = Outline(page)
    assert "script" not in outline.open and outline.images == []
    for source in (page, outline.frames[0]):
        assert "<img src=x" not in source and "<script>alert" not in source
    assert page.count("<script") == 0, "the report itself has no script; the graph's is inside its frame"
    prose = re.sub("^`[^`]*`$", "", text, flags=re.MULTILINE)  # commands are code, in which nothing is marked up
    assert not re.search(r"(?<!\\)<|(?<!\\)\[a(?!ppd3\.html\]\(appd3\.html\))|^# (?!The IOI)", prose, re.MULTILINE)


def test_commands_repeat_what_was_asked_for() -> None:
    results = as_the_paper_says()
    assert openings.commands(results) == ["mamba-ioi reproduce --model tiny"]
    few = {figure: results[figure] for figure in ("fig4", "fig8")}
    assert openings.commands(few) == ["mamba-ioi reproduce --model tiny --only fig4,fig8"]

    def asked(figure: str, **options) -> Result:
        result = results[figure]
        return Result(result.table, result.meta | {"request": result.meta["request"] | options})

    same = {"fig4": results["fig4"], "fig6": asked("fig6", pairs=80)}
    assert openings.commands(same) == ["mamba-ioi reproduce --model tiny --only fig4,fig6 --pairs 80"]
    apart = {"fig4": asked("fig4", pairs=5), "fig8": asked("fig8", layer=3, dtype="float64", seed=1)}
    assert openings.commands(apart) == [
        "mamba-ioi reproduce --model tiny --only fig4 --pairs 5",
        "mamba-ioi reproduce --model tiny --only fig8 --seed 1 --layer 3 --dtype float64",
    ]
    local = asked("fig4", model="my model", weights="ab")
    cuda = Result(local.table, local.meta | {"device": "cuda:0"})
    assert openings.commands({"fig4": cuda}) == ["mamba-ioi reproduce --model './my model' --only fig4 --device cuda:0"]
    assert openings.model_name({"fig4": local}) == "my model" and openings.model_name({}) == "no model"


# --- reproduce and plot -----------------------------------------------------------------------------------------------


def test_reproduce_ends_with_a_report(tmp_path: Path, monkeypatch, capsys) -> None:
    argv = ["reproduce", "--model", "planted", "--pairs", "2", "--out", str(tmp_path), "--only"]
    assert main([*argv, "fig3"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["report       written", f"1 of 1 figures are in {tmp_path}"]
    first = (tmp_path / "report.md").read_text()
    assert "planted" in first and "](fig12.png)" not in first
    assert main([*argv, "fig12"]) == 0
    assert (
        "](fig3.png)" in (tmp_path / "report.md").read_text() and "](fig12.png)" in (tmp_path / "report.md").read_text()
    )
    capsys.readouterr()
    assert main([*argv, "fig12"]) == 0 and "report       kept, it was complete" in capsys.readouterr().out

    def fail(results, paper, bottleneck, questions):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("mamba_ioi.report.judge", fail)
    assert main([*argv, "fig12"]) == 1
    assert capsys.readouterr().err == "mamba-ioi: report failed: RuntimeError: no such luck\n"
    monkeypatch.setitem(CATALOGUE, "fig2", replace(CATALOGUE["fig2"]))
    assert main([*argv, "fig2"]) == 1
    assert not (tmp_path / "report.md").exists(), "a report made without this result passes for none"
    (tmp_path / "report.html").mkdir()
    assert main([*argv, "fig2"]) == 2
    assert "report.html is a folder where the report is to be written" in capsys.readouterr().err


def test_plot_draws_a_whole_folder_again(tmp_path: Path, capsys) -> None:
    results = as_the_paper_says()
    store(tmp_path, {figure: results[figure] for figure in ("fig5", "sec44")}, pictures=False)
    (tmp_path / "results" / "fig4").mkdir()
    (tmp_path / "results" / "fig4" / "meta.json").write_text("{")
    assert main(["plot", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "fig4 failed: ValueError" in said.err and said.err.count("\n") == 1
    assert "sec44        drawn again" in said.out and "report       written" in said.out
    for name in ("fig5.png", "sec44.pdf", "report.html"):
        assert (tmp_path / name).is_file()
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(ValueError, match="holds no results"):
        redraw(tmp_path / "results")


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """<script>
addEventListener("error", event => { document.body.dataset.error = event.message; });
addEventListener("load", () => {
  const data = document.body.dataset, frame = document.querySelector("iframe").contentDocument;
  const seen = () => [...frame.querySelectorAll(".node, .edge")].filter(one => one.getClientRects().length).length;
  data.images = [...document.images].map(image => image.complete && image.naturalWidth > 0).join();
  data.viewport = innerWidth; data.content = document.documentElement.scrollWidth;
  data.wide = [...document.body.querySelectorAll("*")].filter(one =>
    one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll")).map(one => one.tagName).join();
  data.tables = [...document.querySelectorAll("table")].every(one => one.closest(".scroll"));
  frame.getElementById("all").click();
  data.before = seen();
  frame.querySelector("#boxes input").click();
  data.after = seen();
  frame.getElementById("none").click();
  data.none = seen();
});
</script>"""
FRAME = '<!DOCTYPE html><body style="margin:0"><iframe width="390" height="800" style="border:0" srcdoc="{}"></iframe>'
FROM_FRAME = """<script>addEventListener("load", () => {
  Object.assign(document.body.dataset, document.querySelector("iframe").contentDocument.body.dataset); });</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(stored: Path, tmp_path: Path, width: int) -> None:
    page = (stored / "report.html").read_text() + PROBE
    if width == 390:  # narrower than Chromium's windows go
        page = FRAME.format(html.escape(page)) + FROM_FRAME
    found = body_data(page, tmp_path, f"--window-size={width},900")
    assert "error" not in found
    assert found["images"] == ",".join(["true"] * len(CATALOGUE))
    assert int(found["viewport"]) == width or width == 1280
    assert int(found["content"]) <= int(found["viewport"]) and found["wide"] == "" and found["tables"] == "true"
    graph = as_the_paper_says()["appd3"]
    kept = graph.table[graph.table["kept"]]
    nodes, edges = set(kept["src"]) | set(kept["dst"]), set(zip(kept["src"], kept["dst"], strict=True))
    assert int(found["before"]) == len(nodes) + len(edges)
    assert int(found["after"]) == len(nodes) - 1 + sum("embed" not in edge for edge in edges)
    assert found["none"] == "0"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_on_paper(stored: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "report.pdf"
    chromium(stored / "report.html", f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 5
    assert len(re.findall(rb"/Subtype\s*/Image\b", content)) >= len(CATALOGUE)


def test_json_of_the_paper_s_numbers_is_what_the_report_reads() -> None:
    numbers = reference.numbers()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["bottleneck"] == 39 and [188, 0.8433, 0.8524] in numbers["eap"]["curve"]
