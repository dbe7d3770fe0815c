"""`mamba-ioi run EXPERIMENT --data FILE`: the result of the function on those pairs, and one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import mamba_ioi
from mamba_ioi import IOIDataset, PromptPairs, experiments, load_model
from mamba_ioi.cli import main
from mamba_ioi.result import Result

ROWS = [
    ("Then, Mary and John went to the store. Mary gave a drink to", "Mary gave", "John gave", " John", " Mary"),
    ("Then, Paul and Mark went to the school. Paul gave a bone to", "Paul gave", "Mark gave", " Mark", " Paul"),
]


UNEVEN = {
    "clean": "When Paul and Mark arrived at the school, Paul gave a bone to",
    "corrupt": "When Paul and Mark arrived at the school, Mark gave a bone to",
}


def write(path: Path, *, change: dict | None = None) -> Path:
    rows = []
    for text, right, wrong, answer, other in ROWS:
        row = {"clean": text, "corrupt": text.replace(right, wrong), "answer": answer, "corrupt_answer": other}
        rows.append(row | {"group": answer.strip(), "marks": {"third": right}})
    rows[1] = {name: value for name, value in (rows[1] | (change or {})).items() if value is not None}
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_result_is_the_functions(tmp_path: Path, capsys) -> None:
    file, out = write(tmp_path / "pairs.jsonl"), tmp_path / "out"
    words = ["run", "resample_ablation_h", "--data", str(file), "--out", str(out)]
    words += ["--marks", "third, third+1,last", "--metric", "prob_diff"]
    assert main(words) == 0
    model = mamba_ioi.load_model("tiny")
    pairs = PromptPairs.load(file, model.tokenizer)
    marks = ["third", "third+1", "last"]
    expected = experiments.resample_ablation(model, pairs, "h", marks=marks, metric="prob_diff", progress=False)
    found = Result.load(out)
    pd.testing.assert_frame_equal(found.table, expected.table, atol=1e-6)
    assert found.meta["arguments"] == expected.meta["arguments"] and found.meta["data"] == "pairs.jsonl"
    assert main(words) == 0 and "already in" in capsys.readouterr().out
    assert main(["plot", str(out)]) == 0 and (out / "fig10.png").exists()
    assert main([*words[:-1], "margin"]) == 2 and "metric=margin is asked for" in capsys.readouterr().err
    write(file, change={"answer": " Wesley"})
    assert main(words) == 2 and "choose another --out" in capsys.readouterr().err, "the file is another now"


def test_rows_that_differ_in_positions_go_by_all_marks(tmp_path: Path, capsys) -> None:
    file, out = write(tmp_path / "pairs.jsonl", change=UNEVEN), tmp_path / "out"
    assert main(["run", "resample_ablation", "--data", str(file), "--out", str(out)]) == 0
    assert Result.load(out).table["mark"].unique().tolist() == ["third", "last"]
    write(file, change=UNEVEN | {"marks": None})
    capsys.readouterr()
    bare = [json.dumps({k: v for k, v in json.loads(line).items() if k != "marks"}) for line in file.open()]
    file.write_text("\n".join(bare))
    assert main(["run", "resample_ablation", "--data", str(file), "--out", str(tmp_path / "bare")]) == 2
    assert "go by marks=[...]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["layer_removal", "greedy_layer_removal", "cross_talk", "conv_slices", "state_similarity", "layer_parts"],
)
def test_other_experiments(tmp_path: Path, name: str) -> None:
    file, out = write(tmp_path / "pairs.jsonl"), tmp_path / "out"
    assert main(["run", name, "--data", str(file), "--out", str(out)]) == 0
    assert len(Result.load(out).table) > 1


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"corrupt": None}, [], "pairs.jsonl: row 1.*corrupt"),
        ({"answer": " John and"}, [], "pairs.jsonl: row 1 of answer"),
        ({"corrupt": "Then, Mary"}, [], "pairs.jsonl: row 1"),
        ({}, ["--marks", "fourth"], "pairs.jsonl: the data have no mark 'fourth'; they have 'last', 'third'"),
        ({}, ["--marks", "last+1"], "pairs.jsonl: row 0 of mark"),
        ({}, ["--metric", "kl"], "metric is one of nld"),
        ({}, ["--pairs", "3"], "--pairs has no meaning with --data"),
        ({}, ["--marks", "a,,b"], "names with commas between"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, capsys, change, words, message: str) -> None:
    file, out = write(tmp_path / "pairs.jsonl", change=change), tmp_path / "out"
    capsys.readouterr()
    assert main(["run", "resample_ablation", "--data", str(file), "--out", str(out), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resample_ablation", "--data", "gone.jsonl"], "No such file or directory: gone.jsonl"),
        (["resample_ablation", "--marks", "n1"], "give --data FILE as well"),
        (["name_steering", "--data", "PAIRS"], "name_steering takes no pairs from a file"),
        (["layer_removal", "--data", "PAIRS", "--marks", "third"], "layer_removal has no marks"),
        (["cross_talk", "--data", "PAIRS", "--metric", "margin"], "cross_talk has no metric"),
    ],
)
def test_what_has_no_meaning(tmp_path: Path, capsys, monkeypatch, words, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "pairs.jsonl")
    assert main(["run", *(str(file) if word == "PAIRS" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_no_mamba(tmp_path, capsys):
    """What goes through layers works on it; what needs scans says so."""
    folder = tmp_path / "gpt2"
    tokenizer = load_model("tiny").tokenizer
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "pairs.jsonl"
    IOIDataset.generate(tokenizer, 2).save(data)
    asked = ["--model", str(folder), "--data", str(data), "--out"]
    assert main(["run", "layer_removal", *asked, str(tmp_path / "removal")]) == 0
    assert Result.load(tmp_path / "removal").table.layer.tolist() == [-1, 0, 1]
    assert main(["run", "conv_slices", *asked, str(tmp_path / "slices")]) == 2
    assert "Mamba" in capsys.readouterr().err
