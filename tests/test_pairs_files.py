"""Pairs from texts and from files, and back: tokens, answers, marks and groups, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import mamba_ioi
from mamba_ioi import IOIDataset, PromptPairs
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.run import run
from mamba_ioi.interventions.sweep import sweep

FORMATS = ("jsonl", "csv", "parquet")
CLEAN = ["Then, Adam and Amy went to the store. Adam gave a drink to", "Amy and Bob went to the\nstore, Amy gave it to"]
CORRUPT = [
    "Then, Adam and Amy went to the store. Amy gave a drink to",
    "Amy and Bob went to the\nstore, Bob gave it to",
]
ANSWERS, CORRUPT_ANSWERS = [" Amy", " Bob"], [" Adam", " Amy"]
MARKS = {"one": ["Adam and", "Bob went"], "verb": [" gave", [35, 39]], "Then": ["Then", None]}
GROUPS = {"opening": ["Then", "none"], "number": [1, 2]}


@pytest.fixture(scope="module")
def model():
    return mamba_ioi.load_model("tiny")


@pytest.fixture(scope="module", params=["tiny", "neox"])
def tokenizer(request, model) -> PreTrainedTokenizerFast:
    if request.param == "tiny":
        return model.tokenizer
    shared = request.getfixturevalue("shared")
    file = str(shared / "data" / "20B_tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture
def pairs(tokenizer) -> PromptPairs:
    return PromptPairs.from_texts(
        tokenizer,
        CLEAN,
        CORRUPT,
        ANSWERS,
        CORRUPT_ANSWERS,
        marks=MARKS,
        groups=GROUPS,
        candidates=[[" Amy", " Adam", " Bob"], [" Bob", " Amy"]],
    )


def assert_same(one: PromptPairs, other: PromptPairs) -> None:
    for name in ("clean_tokens", "corrupt_tokens", "answers", "corrupt_answers", "last_position"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    width = min(one.candidates.shape[1], other.candidates.shape[1])
    assert torch.equal(one.candidates[:, :width], other.candidates[:, :width])
    assert (one.candidates[:, width:] == -1).all() and (other.candidates[:, width:] == -1).all(), "columns of padding"
    assert dict(one.marks) == one.marks == other.marks and list(one.marks) == list(other.marks)
    assert one.groups == other.groups and one.metric == other.metric


def test_tokens_are_those_of_the_texts(tokenizer, pairs) -> None:
    for texts, tokens in ((CLEAN, pairs.clean_tokens), (CORRUPT, pairs.corrupt_tokens)):
        for text, row, last in zip(texts, tokens, pairs.last_position.tolist(), strict=True):
            expected = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert row[: last + 1].tolist() == expected
            assert tokenizer.decode(row[1 : last + 1]) == text
    assert [tokenizer.decode([token]) for token in pairs.answers.tolist()] == ANSWERS
    assert [tokenizer.decode([token]) for token in pairs.corrupt_answers.tolist()] == CORRUPT_ANSWERS
    assert [tokenizer.decode([token]) for token in pairs.candidates[0].tolist()] == [" Amy", " Adam", " Bob"]
    assert pairs.candidates[1, 2] == -1
    found = {
        name: [
            tokenizer.decode([row[at]]) for row, at in zip(pairs.clean_tokens.tolist(), places.tolist(), strict=True)
        ]
        for name, places in pairs.marks.items()
    }
    assert found["one"] == [" Adam", " Bob"] and found["verb"] == [" gave", " gave"] and found["Then"][0] == "Then"
    assert (
        pairs.marks["Then"].tolist() == [1, -1] and pairs.positions_of("last").tolist() == pairs.last_position.tolist()
    )
    assert pairs.groups == {"opening": ["Then", "none"], "number": [1, 2]}


def test_bos(tokenizer) -> None:
    given = [CLEAN[0]], [CORRUPT[0]], [" Amy"], [" Adam"]
    with_bos = PromptPairs.from_texts(tokenizer, *given, marks={"one": [[6, 10]]})
    without = PromptPairs.from_texts(tokenizer, *given, marks={"one": [[6, 10]]}, bos=False)
    assert torch.equal(with_bos.clean_tokens[:, 1:], without.clean_tokens) and with_bos.clean_tokens[0, 0] == 0
    assert with_bos.marks["one"] == without.marks["one"] + 1
    own = [["<|endoftext|>" + text for text in texts] for texts in given[:2]]
    assert torch.equal(PromptPairs.from_texts(tokenizer, *own, *given[2:]).clean_tokens, with_bos.clean_tokens)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("metric", ["nld", "margin"])
def test_texts_come_back(tokenizer, pairs, ending: str, metric: str, tmp_path: Path) -> None:
    for number, one in enumerate(
        (
            pairs,
            pairs[[1, 0]],
            pairs[1],
            PromptPairs.from_texts(tokenizer, CLEAN, CORRUPT, ANSWERS, CORRUPT_ANSWERS, groups={"group": ["NA", " x"]}),
            PromptPairs.from_texts(
                tokenizer, CLEAN, CORRUPT, [[" Amy", " Ben"], " Bob"], [[" Adam"], [" Amy"]], bos=False
            ),
        )
    ):
        one._set("metric", metric)
        path = one.save(tmp_path / f"{number}.{ending}")
        assert path == tmp_path / f"{number}.{ending}"
        assert_same(one, PromptPairs.load(path, tokenizer))
        assert_same(one, PromptPairs.load(str(path), tokenizer))
    kept = (tmp_path / f"0.{ending}").read_bytes()
    assert b"Adam gave a drink to" in kept and b"clean_tokens" not in kept, "texts that are known are kept as texts"


@pytest.mark.parametrize("ending", FORMATS)
def test_tokens_come_back(model, ending: str, tmp_path: Path) -> None:
    data = IOIDataset.generate(model.tokenizer, 6, seed=4, templates="all")
    changed = PromptPairs.from_texts(model.tokenizer, CLEAN, CORRUPT, ANSWERS, CORRUPT_ANSWERS)
    changed = replace(changed, corrupt_answers=changed.corrupt_answers + 1, candidates=None)
    sets = PromptPairs(
        clean_tokens=data.clean_tokens,
        corrupt_tokens=data.corrupt_tokens,
        answers=torch.nn.functional.pad(data.answers[:, None], (0, 2), value=-1),
        corrupt_answers=data.corrupt_answers,
        last_position=data.last_position,
        marks={"n1": data.name_positions[:, 0], "some": torch.tensor([-1, 3] * 6)},
    )
    for number, one in enumerate((data, data[3:5], changed, sets, sets[[1]])):
        assert_same(one, PromptPairs.load(one.save(tmp_path / f"{number}.{ending}"), model.tokenizer))
    padded = data.select(template=data.templates[int(data.last_position.argmin())])
    assert padded.clean_tokens.shape[1] == 20 > int(padded.last_position.max()) + 1
    assert_same(padded, PromptPairs.load(padded.save(tmp_path / f"padded.{ending}"), model.tokenizer))
    part = data[2:4]
    assert part.save(tmp_path / f"part.{ending}").stat().st_size > 0, (
        "save is not the one that nnsight gives every object"
    )


def test_files_that_others_write(model, tmp_path: Path) -> None:
    rows = [
        {"clean": c, "corrupt": o, "answer": a, "corrupt_answer": b, "group": g, "id": i}
        for i, (c, o, a, b, g) in enumerate(zip(CLEAN, CORRUPT, ANSWERS, CORRUPT_ANSWERS, ["x", "y"], strict=True))
    ]
    expected = PromptPairs.from_texts(
        model.tokenizer, CLEAN, CORRUPT, ANSWERS, CORRUPT_ANSWERS, groups={"group": ["x", "y"]}
    )
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines.replace("\n\n", "\r\n \n"), "utf-8")
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv")
    pd.DataFrame(rows).to_csv(tmp_path / "b.csv", encoding="utf-8-sig", index=False, quoting=csv.QUOTE_ALL)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.PARQUET")
    for name in ("a.jsonl", "a.csv", "b.csv", "a.PARQUET"):
        assert_same(expected, PromptPairs.load(tmp_path / name, model.tokenizer))
    for row in rows:
        row |= {
            "answer": [row["answer"]],
            "marks": {"verb": [row["clean"].index("gave"), row["clean"].index("gave") + 4]},
        }
    table = pd.DataFrame(rows)
    table.to_parquet(tmp_path / "sets.parquet")
    table.assign(answer=table["answer"].map(json.dumps), marks=table["marks"].map(json.dumps)).to_csv(
        tmp_path / "sets.csv"
    )
    for name in ("sets.parquet", "sets.csv"):
        found = PromptPairs.load(tmp_path / name, model.tokenizer)
        assert torch.equal(found.answers, expected.answers[:, None]) and found.groups == expected.groups
        assert [
            model.tokenizer.decode(row[p]) for row, p in zip(found.clean_tokens, found.marks["verb"], strict=True)
        ] == [" gave"] * 2


def test_a_loaded_prompt_is_read_at_its_end(model, pairs, tmp_path: Path) -> None:
    """Each row against a plain run of its prompt alone."""
    found = PromptPairs.load(replace(pairs).save(tmp_path / "a.csv"), model.tokenizer)
    if int(found.clean_tokens.max()) >= model.vocab_size:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            found.check_model(model.vocab_size)
        return
    logits = sweep(model, found.clean_tokens, [[]], Readout.of(found))[0]
    for row, text in enumerate(CLEAN):
        with torch.no_grad():
            alone = model._module(model.to_tokens("<|endoftext|>" + text)[0]).logits[0, -1]
        torch.testing.assert_close(logits[row, 0], alone[found.answers[row]], rtol=0, atol=2e-4)
    whole = run(model, ["<|endoftext|>" + text for text in CLEAN])
    torch.testing.assert_close(whole.gather(1, found.candidates[:, :1]), logits[:, :1], rtol=0, atol=2e-4)


ROW = {"clean": CLEAN[0], "corrupt": CORRUPT[0], "answer": " Amy", "corrupt_answer": " Adam"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": None}, "row 1 lacks the field 'clean'; it has 'corrupt', 'answer', 'corrupt_answer'"),
        ({"answer": None}, "row 1 lacks the field 'answer'"),
        ({"clean": ""}, "row 1 of clean: '' is no text"),
        ({"clean": 5}, "row 1 of clean: 5 is no text"),
        ({"corrupt": CORRUPT[0] + " the"}, "row 1: .* differ in length; clean is 16 tokens long, corrupt 17"),
        ({"corrupt": CORRUPT[0][:-3]}, "row 1: .* differ in length; clean is 16 tokens long, corrupt 15"),
        ({"answer": "Amy"}, "row 1 of answer: 'Amy' does not continue the prompt .*with the space before it"),
        ({"answer": " Amy Bob"}, "row 1 of answer: ' Amy Bob' is 2 tokens; an answer is one"),
        ({"answer": ""}, "row 1 of answer: '' is no text of one token"),
        ({"answer": 3}, "row 1 of answer: 3 is no text"),
        ({"answer": []}, r"row 1 of answer: the list \[\] is empty"),
        ({"answer": [" Amy", " Amy"]}, "row 1 of answers: token .* is named twice"),
        ({"answer": [" Amy", None]}, "row 1 of answer: None is no text"),
        ({"corrupt_answer": " Zork"}, "row 1 of corrupt_answer: ' Zork' is . tokens"),
        ({"corrupt_answer": " Amy"}, "row 1 of corrupt_answers: .* are the clean prompt's answers too"),
        ({"candidates": [" Amy"]}, "row 1 of corrupt_answers: .* is not among the row's candidates"),
        ({"candidates": " Amy"}, "row 1 of candidates: ' Amy' is no list of texts"),
        ({"marks": "verb"}, "row 1 of marks: 'verb' is no object"),
        ({"marks": {"verb": "took"}}, "row 1 of mark 'verb': 'took' does not occur in"),
        ({"marks": {"verb": ""}}, "row 1 of mark 'verb': '' does not occur in"),
        ({"marks": {"one": "Adam"}}, "row 1 of mark 'one': 'Adam' occurs more than once in"),
        ({"marks": {"one": [5, 5]}}, r"row 1 of mark 'one': \[5, 5\] is neither a text nor characters \[start, end\)"),
        ({"marks": {"one": [-3, 5]}}, "row 1 of mark 'one': .* is neither"),
        ({"marks": {"one": [50, 59]}}, "row 1 of mark 'one': .* is neither"),
        ({"marks": {"one": [5]}}, "row 1 of mark 'one': .* is neither"),
        ({"marks": {"one": 5}}, "row 1 of mark 'one': 5 is neither"),
        ({"marks": {"last": "Then"}}, "'last' is no name for a mark"),
        ({"mark": {"one": "Then"}}, "row 1: the field 'mark' is unknown; did you mean 'marks'?"),
        ({"group": "x"}, "row 0 lacks the label 'group'"),
        ({"groups": "x"}, "row 1 of groups: 'x' is no object"),
        ({"groups": {"kind": [1]}}, "row 0 lacks the label 'kind'"),
        ({"bos": "yes"}, "row 1 of bos: it is true or false, not 'yes'"),
        ({"metric": "nll"}, "row 1 of metric: 'nll', but row 0 has 'nld'"),
        (
            {"clean_tokens": [1, 2]},
            r"row 1: it has texts \(clean\) and token ids \(clean_tokens\); keep one of the two",
        ),
    ],
)
def test_rows_that_do_not_fit(model, changes: dict, message: str, tmp_path: Path) -> None:
    row = {name: value for name, value in (ROW | changes).items() if value is not None}
    path = tmp_path / "my pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (ROW, row)), "utf-8")
    with pytest.raises(ValueError, match=message) as error:
        PromptPairs.load(path, model.tokenizer)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean_tokens": [1, "2", 3]}, r"row 0 of clean_tokens: \[1, '2', 3\] is not made of token ids"),
        ({"clean_tokens": [1, 2**70, 3]}, "row 0 of clean_tokens: .* is not made of token ids"),
        ({"clean_tokens": 3}, "row 0 of clean_tokens: 3 is not made"),
        ({"corrupt_tokens": [1, 2]}, "row 0: clean_tokens has 3 tokens, corrupt_tokens 2"),
        ({"last_position": 3}, "row 0 of last_position: 3 is no position"),
        ({"last_position": [2]}, r"row 0 of last_position: \[2\] is not made"),
        ({"last_position": None}, "row 0 lacks the field 'last_position'"),
        ({"answer_tokens": " a"}, "row 0 of answer_tokens: ' a' is not made"),
        ({"candidate_tokens": [7]}, "row 0 of corrupt_answers: 8 is not among"),
        ({"marks": {"a": "x"}}, "row 0 of mark 'a': 'x' is no position"),
        ({"marks": {"a": 5}}, "row 0 of mark 'a': 5 is after"),
    ],
)
def test_rows_of_tokens_that_do_not_fit(model, changes: dict, message: str, tmp_path: Path) -> None:
    row = {
        "clean_tokens": [1, 2, 3],
        "corrupt_tokens": [1, 4, 3],
        "last_position": 2,
        "answer_tokens": 7,
        "corrupt_answer_tokens": 8,
    }
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), "utf-8")
    assert PromptPairs.load(path, model.tokenizer).candidates.tolist() == [[7, 8]]
    path.write_text(json.dumps({name: value for name, value in (row | changes).items() if value is not None}), "utf-8")
    with pytest.raises(ValueError, match=message):
        PromptPairs.load(path, model.tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "the name of a file of pairs ends in .jsonl, .csv or .parquet"),
        ("a.jsonl", "", "there are no rows"),
        ("a.jsonl", json.dumps(ROW) + "\n{clean", r"row 1 \(line 2\): '\{clean' is no JSON"),
        ("a.jsonl", "[1]", r"row 0 \(line 1\): '\[1\]' is no JSON object"),
        ("a.csv", "", "there are no rows"),
        ("a.csv", "clean,corrupt\na,b\n", "row 0 lacks the field 'answer'; it has 'clean', 'corrupt'"),
        ("a.csv", "clean,corrupt,answer,corrupt_answer\na,b, c\n", r"row 0 \(line 2\): it has 3 fields, the header 4"),
        ("a.csv", "clean,clean\na,b\n", "the header names the column 'clean' twice"),
        ("a.csv", 'clean,corrupt,answer,corrupt_answer\n"a"b,c,d,e\n', r"row 0 \(line 2\): it is no CSV"),
        ("a.csv", "clean,corrupt,answer,corrupt_answer,marks\na,b,c,d,verb\n", "row 0 of marks: 'verb' is no JSON"),
        ("a.parquet", "PAR", "it is no Parquet file"),
    ],
)
def test_files_that_are_none(model, name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message) as error:
        PromptPairs.load(tmp_path / name, model.tokenizer)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_files_that_are_not_there(model, pairs, tmp_path: Path) -> None:
    for ending in FORMATS:
        with pytest.raises(OSError, match=f"none.{ending}"):
            PromptPairs.load(tmp_path / f"none.{ending}", model.tokenizer)
    (tmp_path / "latin.csv").write_bytes("clean\né".encode("latin-1"))
    with pytest.raises(ValueError, match="no text in UTF-8"):
        PromptPairs.load(tmp_path / "latin.csv", model.tokenizer)
    with pytest.raises(ValueError, match=r"ends in \.jsonl, \.csv or \.parquet"):
        pairs.save(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="is a callable, which no file can hold"):
        replace(pairs, metric=lambda logits, pairs: logits[:, 0]).save(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": CLEAN[0]}, "clean must be a list with an entry a row, not 'Then"),
        ({"clean": CLEAN[:1]}, "corrupt has 2 rows, clean has 1: row 1 lacks one"),
        ({"answers": ANSWERS[:1]}, "answers has 1 rows, clean has 2: row 1 lacks one"),
        ({"clean": [], "corrupt": [], "answers": [], "corrupt_answers": []}, "there are no rows"),
        ({"answers": None}, "answers must be a list with an entry a row, not None"),
        ({"marks": ["Then"]}, "marks are names with an entry a row each"),
        ({"marks": {"a": ["Then"]}}, "mark 'a' has 1 rows, clean has 2"),
        ({"marks": {"a": ["Then", float("nan")]}}, "row 1 of mark 'a': nan is neither a text nor"),
        ({"groups": {"a": ["x"]}}, "row 1 of group 'a' is missing"),
        ({"candidates": [[" Amy", " Adam"]]}, "candidates has 1 rows, clean has 2"),
        ({"bos": 1}, "bos is True or False, not 1"),
    ],
)
def test_texts_that_do_not_fit(model, changes: dict, message: str) -> None:
    given = {"clean": CLEAN, "corrupt": CORRUPT, "answers": ANSWERS, "corrupt_answers": CORRUPT_ANSWERS}
    with pytest.raises(ValueError, match=message):
        PromptPairs.from_texts(model.tokenizer, **given | changes)


def test_answers_without_a_space(model) -> None:
    """Where the prompt ends in no letter, an answer without a space is what follows."""
    found = PromptPairs.from_texts(model.tokenizer, ["1 +", "a"], ["2 +", "b"], ["1", "\n"], ["2", " Bob"])
    ids = model.tokenizer(["1 +1", "2 +2"], add_special_tokens=False)["input_ids"]
    assert [found.answers[0], found.corrupt_answers[0]] == [row[-1] for row in ids]


def test_rows_that_are_in_no_file(tokenizer, tmp_path) -> None:
    rows = [
        {"clean": CLEAN[row], "corrupt": CORRUPT[row], "answer": ANSWERS[row], "corrupt_answer": [CORRUPT_ANSWERS[row]]}
        | {"groups": {"opening": GROUPS["opening"][row]}, "metric": "margin"}
        for row in (0, 1)
    ]
    found = PromptPairs.from_records(tokenizer, rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert_same(found, PromptPairs.load(tmp_path / "rows.jsonl", tokenizer))
    assert found.metric == "margin" and found.groups == {"opening": GROUPS["opening"]}
    assert rows[0]["metric"] == "margin", "the rows are as they were"
    with pytest.raises(ValueError, match="row 1: 'a text' is no dict with the fields of a row"):
        PromptPairs.from_records(tokenizer, [rows[0], "a text"])
    with pytest.raises(ValueError, match="row 1 lacks the field 'answer'"):
        PromptPairs.from_records(tokenizer, [rows[0], {"clean": "a", "corrupt": "b", "corrupt_answer": "c"}])
