"""What a run will take is said before it starts, and a budget of time is kept to by fewer pairs and figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import mamba_ioi
from mamba_ioi.catalogue import CATALOGUE
from mamba_ioi.cli import main
from mamba_ioi.reproduce import plan as planning
from mamba_ioi.reproduce.makers import Settings, make
from mamba_ioi.result import Result

FORWARD = 0.01


@pytest.fixture(autouse=True)
def forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a forward of a prompt took so long, whatever the machine does."""
    monkeypatch.setattr(planning, "_forward_seconds", lambda model, given: FORWARD)


@pytest.fixture(scope="module")
def model() -> mamba_ioi.MambaModel:
    return mamba_ioi.load_model("planted")


@pytest.mark.parametrize("figure", ["fig4", "fig4_marks", "fig5", "fig5_greedy", "fig6", "fig8", "knockout"])
def test_the_prompts_of_a_plan_are_those_of_the_figure(model: mamba_ioi.MambaModel, figure: str) -> None:
    result = make(CATALOGUE[figure], model, Settings(model="planted", pairs=2))
    rows, forwards = planning.count(CATALOGUE[figure], planning.Sizes(model.n_layers), 2)
    assert rows == result.meta["arguments"]["rows"] and forwards > 0


def test_counts_follow_the_page_of_costs() -> None:
    """Twice the layers: twice the cells of a map, four times the rounds of removal; pairs count in proportion."""
    small, large = planning.Sizes(10), planning.Sizes(20)
    assert large.edges == 231

    def ratio(figure: str) -> float:
        return planning.count(CATALOGUE[figure], large, 4)[1] / planning.count(CATALOGUE[figure], small, 4)[1]

    assert ratio("fig4") == pytest.approx(2) and ratio("fig5") == pytest.approx(2)
    assert ratio("fig5_greedy") == pytest.approx(210 / 55) and ratio("fig8") == pytest.approx(1)
    for figure, row in CATALOGUE.items():
        (one, forwards), (two, more) = (planning.count(row, small, pairs) for pairs in (2, 4))
        assert two == 2 * one and (more > forwards if one else more == forwards), figure


def test_a_budget_takes_as_many_pairs_as_fit(model: mamba_ioi.MambaModel) -> None:
    settings, figures = Settings(model="planted"), ["fig4", "fig5", "fig6"]
    whole = planning.planned(model, settings, figures, None)
    assert whole.pairs is None and not whole.left_out
    assert [work.figure for work in whole.works] == ["bottleneck", *figures]
    assert whole.seconds == pytest.approx(sum(work.forwards for work in whole.works) * FORWARD)
    assert planning.fitted(model, settings, figures, None, 1.01 * whole.seconds).pairs is None
    budget = whole.seconds / 3
    plan = planning.fitted(model, settings, figures, None, budget)
    assert plan.pairs is not None and plan.seconds <= budget and not plan.left_out
    more = planning.planned(model, replace(settings, pairs=plan.pairs + 1), figures, None)
    assert more.seconds > budget, "one pair more would not fit"
    few = replace(settings, pairs=3)
    assert planning.fitted(model, few, figures, None, 1e9).pairs == 3, "never more than were asked for"


def test_a_budget_leaves_out_what_takes_most(model: mamba_ioi.MambaModel) -> None:
    settings, figures = Settings(model="planted"), ["fig3", "fig4", "fig6"]
    least = planning.planned(model, replace(settings, pairs=planning.LEAST_PAIRS), figures, None)
    costs = {work.figure: work.seconds for work in least.works}
    plan = planning.fitted(model, settings, figures, None, least.seconds - 0.5 * costs["fig6"])
    assert [work.figure for work in plan.left_out] == ["fig6"] and plan.pairs == planning.LEAST_PAIRS
    assert [work.figure for work in plan.works] == ["bottleneck", "fig3", "fig4"]
    with pytest.raises(ValueError, match="nothing fits into a budget of 0 s: the least, fig4, takes about"):
        planning.fitted(model, settings, ["fig4", "fig6"], None, 0.001)
    again = planning.Plan.of(plan.result(model))
    assert again == plan


@pytest.mark.slow
def test_a_run_keeps_to_the_budget_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = ["reproduce", "--model", "planted", "--only", "fig3,fig4,fig5,fig6", "--out", str(out)]
    assert main([*argv, "--plan"]) == 0 and not out.exists()
    said = capsys.readouterr().out
    assert "fig4         160 prompts, " in said and "at most about" in said and "with" not in said
    assert "where a forward of a prompt takes 10 ms" in said
    assert main([*argv, "--budget", "20s"]) == 0
    said = capsys.readouterr().out
    assert said.index("fig4         ") < said.index("of a budget of 20 s, with ") < said.index("fig3         computed")
    pairs = Result.load(out / "results" / "plan").meta["arguments"]["pairs"]
    assert Result.load(out / "results" / "fig4").meta["request"]["pairs"] == pairs > 1
    assert f"20 s on cpu: {pairs} pairs a figure" in (out / "report.md").read_text()
    monkeypatch.setattr(planning, "_forward_seconds", None)  # nothing is measured again
    (out / "results" / "fig5" / "meta.json").unlink()
    assert main([*argv, "--budget", "20s"]) == 0
    assert Result.load(out / "results" / "fig5").meta["request"]["pairs"] == pairs
    capsys.readouterr()
    assert main([*argv, "--budget", "30s"]) == 2
    assert "holds a result with budget=20.0, and budget=30.0 is asked for" in capsys.readouterr().err


def test_a_figure_that_does_not_fit_is_named_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["reproduce", "--model", "planted", "--only", "fig3,fig5,fig6", "--out", str(tmp_path), "--budget", "4s"]
    assert main(argv) == 0
    assert "fig6         left out: it takes about" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert "left out, since they do not fit: Figure 6 (about" in report
    assert not (tmp_path / "fig6.png").exists() and (tmp_path / "fig5.png").exists()


@pytest.mark.parametrize("text", ["", "2", "0h", "h", "2 hours", "1e3s"])
def test_a_budget_is_a_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--budget", text]) == 2
    assert f"must be a time such as 90s, 40min or 2h, not {text!r}" in capsys.readouterr().err


def test_a_study_has_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--study", "recall", "--plan"]) == 2
    assert "--plan and --budget are for the figures of one model" in capsys.readouterr().err
