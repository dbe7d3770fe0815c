"""`mamba-ioi reproduce --data FILE`: every figure that needs no names, a folder a file, a report without names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import mamba_ioi
from mamba_ioi import PromptPairs, circuits, experiments, load_model
from mamba_ioi.catalogue import CATALOGUE
from mamba_ioi.cli import main
from mamba_ioi.report import judge, write_report
from mamba_ioi.result import Result

from . import report_examples as made
from .test_cli import refusal, snapshot

ALIGNED = (
    ("Then, Mary and John went to the store. Mary gave a drink to", "Mary gave", "John gave", " John", " Mary"),
    ("Then, Paul and Mark went to the school. Paul gave a bone to", "Paul gave", "Mark gave", " Mark", " Paul"),
)
UNEVEN = (ALIGNED[0], ("When Paul and Mark arrived at the school, Paul gave a bone to", *ALIGNED[1][1:]))
ANYWHERE = [figure for figure, row in CATALOGUE.items() if not row.needs_names]


def write(path: Path, rows=ALIGNED, *, marks: bool = True, change: dict | None = None) -> Path:
    found = []
    for text, right, wrong, answer, other in rows:
        row = {"clean": text, "corrupt": text.replace(right, wrong), "answer": answer, "corrupt_answer": other}
        found.append(row | {"group": answer.strip()} | ({"marks": {"third": right}} if marks else {}))
    found[1] = {name: value for name, value in (found[1] | (change or {})).items() if value is not None}
    path.write_text("\n".join(map(json.dumps, found)))
    return path


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of two rows, and the folder that is made of it."""
    folder = tmp_path_factory.mktemp("data")
    file, out = write(folder / "pairs.jsonl"), folder / "out"
    assert main(["reproduce", "--data", str(file), "--out", str(out)]) == 0
    return file, out


def prose(out: Path) -> list[str]:
    """What both reports say: Markdown as it is, the page without its style, pictures and pages within."""
    page = re.sub(
        r"<style>.*?</style>|data:image[^\"]*|srcdoc=\"[^\"]*\"", "", (out / "report.html").read_text(), flags=re.S
    )
    return [(out / "report.md").read_text(), re.sub(r"<[^>]*>", " ", page)]


@pytest.mark.slow
def test_every_figure_that_needs_no_names_is_made_of_the_file(made_of) -> None:
    file, out = made_of
    assert {"fig4", "fig6", "fig7", "appd3", "sec44", "fig2"} < set(ANYWHERE)
    assert not {"fig4_marks", "fig9", "fig9_pca"} & set(ANYWHERE)
    assert sorted(path.name for path in (out / "results").iterdir()) == sorted([*ANYWHERE, "bottleneck"])
    model = load_model("tiny")
    pairs = PromptPairs.load(file, model.tokenizer)
    layer = mamba_ioi.bottleneck(model, pairs)
    expected = {
        "fig4": experiments.resample_ablation(model, pairs, progress=False),
        "fig8": experiments.conv_slices(model, pairs, layer, progress=False),
        "fig6": experiments.cross_talk(model, pairs, progress=False),
        "appd3": circuits.pipeline.positional_circuit(model, pairs),
    }
    for figure, result in expected.items():
        found = Result.load(out / "results" / figure)
        pd.testing.assert_frame_equal(found.table, result.table, atol=1e-6)
        assert found.meta["data"] == "pairs.jsonl" and found.meta["rows"] == 2
        assert (out / f"{figure}.png").is_file() and (out / f"{figure}.pdf").is_file()
    assert "held_out" not in Result.load(out / "results" / "appd3").meta["circuit"]


def test_the_bottleneck_is_chosen_once_and_recorded(made_of) -> None:
    file, out = made_of
    record = Result.load(out / "results" / "bottleneck")
    model = load_model("tiny")
    pairs = PromptPairs.load(file, model.tokenizer)
    assert record.table["layer"].tolist() == list(range(1, model.n_layers))
    best = int(record.table.loc[record.table["effect"].idxmax(), "layer"])
    assert record.meta["arguments"]["layer"] == best == mamba_ioi.bottleneck(model, pairs)
    for figure in ("fig7", "fig8", "sec44"):
        assert Result.load(out / "results" / figure).meta["arguments"]["layer"] == best
    shown = f"layer {best} ({record.table['effect'].max():.3f}); next, layer"
    assert all(shown in text for text in prose(out))


def test_a_recorded_bottleneck_is_the_one_that_is_used(tmp_path: Path, capsys) -> None:
    """By the figures that are added later, and by the report; an API call with a layer of its own changes nothing."""
    file, out = write(tmp_path / "pairs.jsonl"), tmp_path / "out"
    words = ["reproduce", "--data", str(file), "--out", str(out), "--only"]
    assert main([*words, "fig4"]) == 0
    record = Result.load(out / "results" / "bottleneck")
    other = 4 if record.meta["arguments"]["layer"] != 4 else 3
    Result(record.table, record.meta | {"arguments": record.meta["arguments"] | {"layer": other}}).save(
        out / "results" / "bottleneck"
    )
    assert main([*words, "fig8"]) == 0
    assert Result.load(out / "results" / "fig8").meta["arguments"]["layer"] == other
    assert f"and not the bottleneck, layer {other}" in (out / "report.md").read_text()
    assert main([*words, "fig8", "--layer", "2"]) == 2
    assert "layer=None, and layer=2 is asked for" in capsys.readouterr().err


def test_the_report_speaks_of_no_names(made_of) -> None:
    _, out = made_of
    for text in prose(out):
        assert "pairs.jsonl in tiny" in text and "pairs.jsonl, 2 rows" in text.replace("\\", "")
        assert "the answer beats the other candidates in 1.000" in text
        assert "mamba-ioi reproduce --model tiny --data pairs.jsonl" in text
        assert "The pairs are 2 rows: means and intervals over so few say little of others." in text
        assert "cannot be read" not in text and "left out" not in text and "In the paper" not in text
        rest = text.replace("the names are those of the activations", "")
        assert not re.search(r"\bnames?\b|IOI|Indirect|corruption|held[- ]out", rest), re.search(
            r".{40}(\bnames?\b|IOI|Indirect|corruption|held[- ]out).{40}", rest
        )


def test_a_folder_goes_on_and_holds_one_file(made_of, tmp_path: Path, capsys, monkeypatch) -> None:
    file, out = made_of
    before = snapshot(out)
    words = ["reproduce", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(mamba_ioi.models.model, "load_model", None)  # nothing is computed, so no model is needed
        assert main([*words, "--data", str(file)]) == 0
    assert snapshot(out) == before
    elsewhere = write(tmp_path / "moved.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(mamba_ioi.models.model, "load_model", None)
        assert main([*words, "--data", str(elsewhere)]) == 0, "the content tells a file, and not its name"
    other = write(tmp_path / "other.jsonl", change={"group": "other"})
    assert "data=" in refusal(capsys, *words, "--data", other) and snapshot(out) == before
    assert "choose another --out" in refusal(capsys, *words, "--data", other, "--only", "fig2")
    assert "marks=None, and marks=['third']" in refusal(capsys, *words, "--data", file, "--marks", "third")
    assert "metric=None, and metric=margin" in refusal(capsys, *words, "--data", file, "--metric", "margin")
    assert "data=None is asked for" in refusal(capsys, *words, "--only", "fig3")
    assert "data=None, task=recall is asked for" in refusal(capsys, *words, "--only", "fig3", "--task", "recall")
    assert snapshot(out) == before
    assert main(["reproduce", "--only", "fig3", "--out", str(tmp_path / "own")]) == 0
    assert "data=None, and data=" in refusal(capsys, "reproduce", "--data", file, "--out", tmp_path / "own")


@pytest.mark.slow
def test_rows_that_differ_in_positions(tmp_path: Path, capsys) -> None:
    """What can go by marks does; what needs positions is left out, or refused where it is asked for."""
    file, out = write(tmp_path / "pairs.jsonl", UNEVEN), tmp_path / "out"
    words = ["reproduce", "--data", str(file), "--metric", "prob_diff", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"^sec44 +left out: it needs rows whose marks and last token stand at the same", said, re.M)
    assert f"{len(ANYWHERE) - 3} of {len(ANYWHERE)} figures are in" in said
    model = load_model("tiny")
    pairs = PromptPairs.load(file, model.tokenizer)
    expected = experiments.resample_ablation(model, pairs, marks=["third", "last"], metric="prob_diff", progress=False)
    found = Result.load(out / "results" / "fig4")
    pd.testing.assert_frame_equal(found.table, expected.table, atol=1e-6)
    assert Result.load(out / "results" / "appd1").meta["arguments"]["metric"] == "prob_diff"
    text = re.sub(r"\\(.)", r"\1", (out / "report.md").read_text())
    assert "lowers prob_diff by up to" in text and "(how much prob_diff falls)" in text and "cannot be read" not in text
    assert "| by the marks | third, last |" in text and "with the other options above" in text
    assert "at one mark" in text and "By marks only some places are looked at" in text
    assert "appd3 cannot be made of these pairs" in refusal(capsys, *words, "--only", "appd3")
    bare = write(tmp_path / "bare.jsonl", UNEVEN, marks=False)
    words = ["reproduce", "--data", str(bare), "--out", str(tmp_path / "bare"), "--only"]
    assert "there are no marks to go by" in refusal(capsys, *words, "fig10")
    assert main([*words, "fig10", "--marks", "last"]) == 0
    assert Result.load(tmp_path / "bare" / "results" / "fig10").table["mark"].unique().tolist() == ["last"]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"corrupt": None}, [], "pairs.jsonl: row 1 lacks the field 'corrupt'"),
        ({"answer": " John and"}, [], "pairs.jsonl: row 1 of answer.*is 2 tokens; an answer is one"),
        ({"corrupt": "Then, Mary"}, [], "pairs.jsonl: row 1: the clean and the corrupt prompt differ in length"),
        ({"group": None}, [], "pairs.jsonl: row 1 lacks the label 'group'"),
        ({}, ["--marks", "fourth"], "pairs.jsonl: the data have no mark 'fourth'; they have 'last', 'third'"),
        ({}, ["--marks", "last+1"], "pairs.jsonl: row 0 of mark"),
        ({}, ["--metric", "kl"], "metric is one of nld"),
        ({}, ["--pairs", "3"], "--pairs has no meaning with --data"),
        (
            {},
            ["--only", "fig9"],
            "fig9, fig9_pca is about the names in the paper's prompts; of another task there are fig2",
        ),
        ({}, ["--layer", "17", "--only", "fig8"], "from 0 to 5"),
        ({}, ["--layer", "1", "--only", "fig4"], "none looks at one layer"),
        ({}, ["--task", "recall"], "not allowed with argument"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, capsys, change, words, message: str) -> None:
    file, out = write(tmp_path / "pairs.jsonl", change=change), tmp_path / "out"
    said = refusal(capsys, "reproduce", "--data", file, "--out", out, *words)
    assert re.search(message, said), said
    assert not out.exists()


def test_a_group_with_the_name_of_a_column(tmp_path: Path, capsys) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in write(file).read_text().splitlines()]
    file.write_text(
        "\n".join(
            json.dumps({k: v for k, v in row.items() if k != "group"} | {"groups": {"layer": "a"}}) for row in rows
        )
    )
    said = refusal(capsys, "reproduce", "--data", file, "--out", tmp_path / "out")
    assert "pairs.jsonl: the group 'layer' of the data has the name of a column of the table" in said


def test_files_and_tasks_that_are_not_there(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "No such file or directory: gone.jsonl" in refusal(capsys, "reproduce", "--data", "gone.jsonl")
    assert "there is no task 'chess'" in refusal(capsys, "reproduce", "--task", "chess")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no rows" in refusal(capsys, "reproduce", "--data", "empty.jsonl", "--out", "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty.jsonl"]


def test_a_task_has_pairs_to_judge_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["reproduce", "--task", "ioi", "--pairs", "6", "--seed", "3", "--only", "fig5,appd1", "--out", str(out)]
    assert main(words) == 0
    found = Result.load(out / "results" / "appd1")
    assert found.meta["circuit"]["held_out"]["n_rows"] == 6 and found.meta["request"]["task"] == "ioi"
    text = re.sub(r"\\(.)", r"\1", (out / "report.md").read_text())
    assert text.startswith("# ioi in tiny") and "has, on held-out pairs and with everything outside it" in text
    assert "--task ioi --only fig5,fig5_greedy,appd1 --pairs 6 --seed 3" in text


def test_a_model_that_is_no_mamba(tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    tokenizer = load_model("tiny").tokenizer
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = write(tmp_path / "pairs.jsonl")
    assert main(["reproduce", "--model", str(folder), "--data", str(file), "--out", str(out)]) == 0
    assert "fig4         left out: " in capsys.readouterr().out
    expected = {"fig3", "fig5", "fig5_greedy", "appd1", "appd3", "lens", "direct"}
    assert {path.name for path in (out / "results").iterdir()} == expected
    assert "cannot be read" not in (out / "report.md").read_text()


# --- the rules, on made-up tables -------------------------------------------------------------------------------------


def of_a_file(results: dict[str, Result], **arguments) -> dict[str, Result]:
    """The same results, as they would be of a file with the group ``kind``."""
    found = {}
    for figure, result in results.items():
        table = result.table.rename(columns={"corruption": "kind"})
        meta = result.meta | {"request": result.meta["request"] | {"data": "0" * 64}, "data": "a.csv", "rows": 160}
        meta |= {"kind": ["template", "kind"]} if figure == "fig6" else {}
        found[figure] = Result(table, meta | {"arguments": meta["arguments"] | arguments})
    return found


def test_the_claims_that_are_about_no_names_are_put_to_other_pairs() -> None:
    results = of_a_file({figure: made.as_the_paper_says()[figure] for figure in ANYWHERE})
    claims = judge(results, bottleneck=1)
    assert [claim.key for claim in claims] == [
        *("task", "bottleneck", "shift", "last", "exchange", "later", "dictionary", "circuit")
    ]
    assert {claim.verdict for claim in claims} == {"holds"}
    for claim in claims:
        assert claim.paper == "" and claim.missing == () and "name" not in claim.title
        for finding in claim.findings:
            assert "cannot be read" not in finding.sentence
            assert not {"name", "corruption"} & set(re.findall(r"[a-z]+", f"{finding.sentence} {finding.rule}"))
    said = " ".join(finding.sentence for claim in claims for finding in claim.findings)
    assert "it leads in 5 of 5 kinds of pairs" in said and "so that it arrives +1 from the token that differs" in said


def test_under_another_metric_thresholds_of_the_nld_decide_nothing() -> None:
    results = of_a_file({figure: made.as_the_paper_says()[figure] for figure in ANYWHERE}, metric="margin")
    found = {finding.figure: finding for claim in judge(results, bottleneck=1) for finding in claim.findings}
    for figure in ("fig4", "fig8", "fig10", "flow"):
        assert found[figure].holds is None
        assert (
            "As effects are of margin, for which no threshold is known, this decides nothing." in found[figure].sentence
        )
    assert found["fig11"].holds is True and "lowers margin by 0.902" in found["fig11"].sentence
    own = found.pop("features_edges")  # how far a feature goes is no effect on the answer
    assert "of the way to its value of the corrupt prompts" in own.sentence
    assert "of the way" not in " ".join(finding.sentence for finding in found.values())


def test_tables_by_marks_of_another_task() -> None:
    own = made.fig4_marks({0: 0.9, 1: 0.8, 2: 0.1})
    last = own.table["mark"] == "last"
    for effect, holds in ((9.0, "at the last position alone among the marks"), (0.5, "and not there alone")):
        table = own.table.assign(effect=own.table["effect"].where(~last, effect), low=0.05)
        results = of_a_file({"fig4": own, "fig10": Result(table, own.meta), "fig11": Result(table, own.meta)})
        found = {one.figure: one for claim in judge(results, bottleneck=2) for one in claim.findings}
        assert "resampling layer 2's input at one mark" in found["fig4"].sentence and found["fig4"].holds is False
        assert found["fig10"].holds is None and "0.020 at n1" in found["fig10"].sentence
        assert found["fig11"].holds is None and holds in found["fig11"].sentence


def test_the_papers_numbers_stand_beside_its_own_pairs_only(tmp_path: Path) -> None:
    own = {figure: made.as_the_paper_says(made.LARGE)[figure] for figure in ("fig4", "fig5")}
    for folder, results in (("own", own), ("other", of_a_file(own))):
        write_report(made.store(tmp_path / folder, results, pictures=False))
        text = (tmp_path / folder / "report.md").read_text()
        assert ("| paper |" in text) is (folder == "own")
