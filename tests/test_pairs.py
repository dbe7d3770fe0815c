"""Pairs of prompts: what they are, and that what does not fit together is refused when it is made."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import mamba_ioi
from mamba_ioi import IOIDataset, PromptPairs, circuits, experiments, metrics
from mamba_ioi.interventions.patch import Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.tasks.ioi import CORRUPTIONS, TEMPLATES

CLEAN = torch.tensor([[9, 3, 4, 5, 6], [9, 3, 4, 7, 0], [9, 8, 0, 0, 0]])
CORRUPT = torch.tensor([[9, 2, 4, 5, 6], [9, 3, 1, 7, 0], [9, 7, 0, 0, 0]])
LAST = torch.tensor([4, 3, 1])


def made(**changes) -> PromptPairs:
    """Three pairs of prompts of 5, 4 and 2 tokens, changed."""
    columns = {
        "clean_tokens": CLEAN,
        "corrupt_tokens": CORRUPT,
        "answers": torch.tensor([10, 11, 12]),
        "corrupt_answers": torch.tensor([20, 21, 22]),
        "last_position": LAST,
        "candidates": torch.tensor([[10, 20, -1], [11, 21, 30], [22, 12, -1]]),
        "marks": {"a": torch.tensor([1, 2, -1]), "b": torch.tensor([3, 3, 1])},
        "groups": {"kind": ["x", "y", "x"], "number": [1, 2, 2]},
    }
    return PromptPairs(**columns | changes)


@pytest.fixture(scope="module")
def model():
    return mamba_ioi.load_model("tiny")


@pytest.fixture(scope="module")
def ioi(model) -> IOIDataset:
    return IOIDataset.generate(model.tokenizer, 6, seed=3)


@pytest.mark.untyped
def test_what_is_left_out_is_filled_in() -> None:
    pairs = PromptPairs(
        clean_tokens=CLEAN + 1, corrupt_tokens=CORRUPT + 1, answers=[1, 2, 3], corrupt_answers=[4, 5, 6]
    )
    assert pairs.last_position.tolist() == [4, 4, 4] and pairs.candidates.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert pairs.marks == {} and pairs.groups == {} and pairs.metric == "nld" and len(pairs) == 3
    assert pairs.positions_of("last").tolist() == [4, 4, 4]
    sets = made(answers=[[10, 30], [11, -1], [12, 13]], candidates=None)
    assert sets.candidates.tolist() == [[10, 30, 20], [11, 21, -1], [12, 13, 22]]
    assert PromptPairs(clean_tokens=[[1]], corrupt_tokens=[[1]], answers=[0], corrupt_answers=[1]).position_labels == [
        "out"
    ]


@pytest.mark.untyped
def test_lists_and_arrays_are_taken() -> None:
    names = ("clean_tokens", "corrupt_tokens", "answers", "corrupt_answers", "last_position", "candidates")
    expected = made()
    for take in (
        lambda column: column.tolist(),
        lambda column: tuple(column.tolist()),
        lambda column: column.numpy(),
        lambda column: column.numpy().astype(np.uint8) if column.min() >= 0 else column.numpy().astype(np.int16),
        lambda column: column.int(),
        lambda column: list(column),
        lambda column: list(column.numpy()),
    ):
        found = made(**{name: take(getattr(expected, name)) for name in names}, marks={"a": take(expected.marks["a"])})
        for name in names:
            column = getattr(found, name)
            assert column.dtype == torch.long and torch.equal(column, getattr(expected, name)), name
        assert torch.equal(found.marks["a"], expected.marks["a"])
    labelled = made(groups={"kind": np.array(["x", "y", "x"]), "number": torch.tensor([1, 2, 2])})
    assert labelled.groups == expected.groups and all(type(label) is str for label in labelled.groups["kind"])
    array = CLEAN.numpy().copy()
    copied = made(clean_tokens=array)
    array[:] = -5
    assert torch.equal(copied.clean_tokens, CLEAN), "an array that changes later changes nothing"


def test_rows_and_selections() -> None:
    pairs = made(metric="margin")
    for index, rows in (
        (1, [1]),
        (slice(0, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
    ):
        part = pairs[index]
        assert torch.equal(part.clean_tokens, CLEAN[rows]) and torch.equal(part.candidates, pairs.candidates[rows])
        assert torch.equal(part.marks["a"], pairs.marks["a"][rows])
        assert part.groups["kind"] == [pairs.groups["kind"][row] for row in rows] and part.metric == "margin"
    assert torch.equal(pairs.select(kind="x").answers, pairs.answers[[0, 2]])
    assert torch.equal(pairs.select(kind="x", number=2).answers, pairs.answers[[2]])
    assert torch.equal(pairs.select(number=[1, 2], kind="y").answers, pairs.answers[[1]])
    assert len(pairs.select()) == 3 and len(pairs[[]]) == 0
    for chosen, message in (
        ({"color": "x"}, "no group 'color'; they have 'kind', 'number'"),
        ({"kind": "z"}, "unknown kind 'z'; the data have 'x', 'y'"),
    ):
        with pytest.raises(ValueError, match=message):
            pairs.select(**chosen)
    with pytest.raises(IndexError):
        pairs[3]
    again = pickle.loads(pickle.dumps(pairs))
    assert again.marks == pairs.marks and again.groups == pairs.groups


def test_marks() -> None:
    pairs = made()
    assert pairs.positions_of("a").tolist() == [1, 2, -1]
    assert pairs.positions_of("a+1").tolist() == [2, 3, -1] and pairs.positions_of("b-1").tolist() == [2, 2, 0]
    assert pairs.positions_of("last").tolist() == [4, 3, 1] and pairs.positions_of("last-1").tolist() == [3, 2, 0]
    for mark, message in (
        ("c", "no mark 'c'; they have 'last', 'a', 'b'"),
        ("c+1", "no mark 'c\\+1'"),
        (1, "no mark 1"),
        ("last+1", "row 0 of mark 'last\\+1': 5 is no position of the row's prompt"),
        ("b+1", "row 1 of mark 'b\\+1': 4 is no position"),
        ("a-2", "row 0 of mark 'a-2': -1 is no position"),
    ):
        with pytest.raises(ValueError, match=message):
            pairs.positions_of(mark)
    assert pairs.position_labels is None
    assert pairs[1].position_labels == ["pos0", "pos1", "a", "out", "pad4"]
    with_mark = made(marks={"a": [1, 1, 1], "none": [-1, -1, -1]})[:1]
    assert with_mark.position_labels == ["pos0", "a", "pos2", "pos3", "out"]


NOT_WHOLE = [
    (lambda column: column.float(), "is torch.float32, and no integer"),
    (lambda column: column.double().fill_(float("nan")), "nan is torch.float64"),
    (lambda column: column.bool(), "is torch.bool"),
    (lambda column: (column + 0.5).tolist(), "row 0 of .*: .*5 is torch.float64"),
    (lambda column: column.numpy().astype(float), "torch.float64"),
    (lambda column: [str(token) for token in column.flatten().tolist()], "is no whole number"),
    (lambda column: [None] * len(column), "None is no whole number"),
    (lambda column: [True] * len(column), "True is no whole number"),
    (lambda column: 7, "shape"),
    (lambda column: "tokens", "not 'tokens'"),
    (lambda column: {"a": 1}, "must be whole numbers"),
    (lambda column: column[None, None], "of shape .* not of shape"),
    (lambda column: column[:-1], "row 2 .*is missing|must have one length"),
    (lambda column: torch.cat([column, column[:1]]), "row 3 .*is too much|must have one length"),
    (lambda column: column.to("meta"), "meta device"),
]


@pytest.mark.parametrize(
    "name", ["corrupt_tokens", "answers", "corrupt_answers", "last_position", "candidates", "marks"]
)
@pytest.mark.parametrize("case", range(len(NOT_WHOLE)))
def test_columns_that_are_none(name: str, case: int) -> None:
    change, message = NOT_WHOLE[case]
    value = made().marks["a"] if name == "marks" else getattr(made(), name)
    value = {"a": change(value)} if name == "marks" else change(value)
    with pytest.raises(ValueError, match=message) as error:
        made(**{name: value})
    assert ("mark 'a'" if name == "marks" else name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        replace(made(), **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean_tokens": None}, "clean_tokens must be whole numbers"),
        ({"clean_tokens": CLEAN[0]}, r"clean_tokens .* \[B, n\], not of shape \(5,\)"),
        ({"clean_tokens": [[1, 2], [3]]}, r"row 1 of clean_tokens: \[3\] is not as long as row 0, \[1, 2\]"),
        (
            {"clean_tokens": CLEAN[:, :0], "corrupt_tokens": CORRUPT[:, :0]},
            "row 0 of clean_tokens: the prompt is empty",
        ),
        ({"clean_tokens": CLEAN.where(CLEAN != 7, -7)}, r"row 1 of clean_tokens: -7 is no token id.*\(column 3\)"),
        ({"corrupt_tokens": CORRUPT.where(CORRUPT != 2, -1)}, "row 0 of corrupt_tokens: -1 is no token id"),
        ({"corrupt_tokens": CORRUPT[:, :4]}, r"must have one length, .* is \(3, 5\), corrupt_tokens \(3, 4\)"),
        ({"last_position": [4, -1, 1]}, "row 1 of last_position: -1 is no position of a prompt, 0 to 4"),
        ({"last_position": [4, 3, 5]}, "row 2 of last_position: 5 is no position"),
        ({"answers": [10, -1, 12]}, "row 1 of answers: -1 is no token id"),
        ({"answers": [10, 13, 12]}, "row 1 of answers: 13 is not among the row's candidates"),
        ({"corrupt_answers": [20, 21, 23]}, "row 2 of corrupt_answers: 23 is not among the row's candidates"),
        ({"answers": [[10, -1], [11, 31], [12, -1]]}, r"row 1 of answers: 31 is not among .*\(column 1\)"),
        ({"answers": [[10, -1], [-1, -1], [12, -1]]}, "row 1 of answers: the set .* is empty"),
        ({"corrupt_answers": [[20, 20], [21, -1], [22, -1]]}, "row 0 of corrupt_answers: token 20 is named twice"),
        ({"answers": [[10, -2], [11, -1], [12, -1]]}, "row 0 of answers: -2 is no token id.*-1 is padding"),
        ({"candidates": [[10, 20, 10], [11, 21, 30], [22, 12, -1]]}, "row 0 of candidates: token 10 is named twice"),
        ({"candidates": [[10, 20, -3], [11, 21, 30], [22, 12, -1]]}, "row 0 of candidates: -3 is no token id"),
        ({"candidates": [[10], [11], [12]]}, "row 0 of corrupt_answers: 20 is not among"),
        ({"corrupt_answers": [20, 11, 22]}, r"row 1 of corrupt_answers: \[11\] are the clean prompt's answers too"),
        (
            {"answers": [[10, 20], [11, -1], [12, -1]], "candidates": None},
            r"row 0 of candidates: all of \[10, 20\] are right answers",
        ),
        ({"marks": [1, 2, 3]}, "marks are names of positions"),
        ({"marks": {"a": [1, 4, 1]}}, "row 1 of mark 'a': 4 is after the row's last_position"),
        ({"marks": {"a": [1, -2, 1]}}, "row 1 of mark 'a': -2 is no position; -1 says that the row has none"),
        ({"marks": {"last": LAST}}, "'last' is no name for a mark"),
        ({"marks": {"n1+1": LAST}}, r"'n1\+1' is no name for a mark"),
        ({"marks": {"": LAST}}, "'' is no name"),
        ({"marks": {3: LAST}}, "3 is no name"),
        ({"groups": ["x", "y", "x"]}, "groups are names with one label a row"),
        ({"groups": {"kind": ["x", "y"]}}, "row 2 of group 'kind' is missing: it has 2 rows, clean_tokens has 3"),
        ({"groups": {"kind": ["x", "y", "x", "x"]}}, "row 3 of group 'kind' is too much"),
        ({"groups": {"kind": "xyx"}}, "group 'kind' must be a list with one label a row, not 'xyx'"),
        (
            {"groups": {"kind": ["x", None, "x"]}},
            "row 1 of group 'kind': a label is a text or a whole number, not None",
        ),
        ({"groups": {"kind": ["x", float("nan"), "x"]}}, "row 1 of group 'kind': .* not nan"),
        ({"metric": "NLD"}, "metric is one of nld, logit_diff, prob_diff, margin, or a callable, not 'NLD'"),
        ({"metric": None}, "metric is one of .* not None"),
    ],
)
def test_what_does_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        made(**changes)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        replace(made(), **changes)


@pytest.mark.untyped
def test_what_looks_odd_and_is_right() -> None:
    made(metric="margin", corrupt_answers=[20, 11, 22])  # the corruption may leave an answer as it is
    made(metric=lambda logits, pairs: logits[:, 0])
    made(answers=[[10, 30], [11, -1], [12, 23]], corrupt_answers=[[30, 20], [21, -1], [22, -1]], candidates=None)
    made(groups={"kind": ["", "y", "x"]}, marks={"a": [-1, -1, -1]}, last_position=[4, 3, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------------------------------


def pairs_of(clean: list[list[int]], corrupt: list[list[int]], last: list[int] | None = None) -> PromptPairs:
    rows = range(len(clean))
    return PromptPairs(
        clean_tokens=torch.tensor(clean),
        corrupt_tokens=torch.tensor(corrupt),
        answers=torch.tensor([30 + row for row in rows]),
        corrupt_answers=torch.tensor([60 + row for row in rows]),
        last_position=None if last is None else torch.tensor(last),
    )


@pytest.mark.parametrize(
    ("clean", "corrupt", "last", "message"),
    [
        # BOS = padding = 0, as in GPT-NeoX's tokenizer: moved to the left, its last token lost, two tokens shorter
        ([[0, 1, 2, 3, 4]], [[0, 5, 3, 4, 0]], None, "row 0: .* differ in length; .* the corrupt prompt is shorter"),
        (
            [[0, 1, 2, 3, 4]],
            [[0, 5, 2, 3, 0]],
            [4],
            "row 0: .* differ in length; at last_position 4 corrupt_tokens holds 0",
        ),
        ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], [[0, 5, 2, 3, 4], [0, 5, 4, 0, 0]], None, "row 1: .* differ in length"),
        ([[0, 5, 4, 0, 0]], [[0, 1, 2, 3, 4]], None, "row 0: .* clean_tokens holds 0.* the clean prompt is shorter"),
        # another BOS that pads
        ([[50, 1, 2, 3, 4]], [[50, 5, 3, 4, 50]], None, "row 0: .* holds 50, with which every prompt begins"),
        # padding that other rows show
        ([[1, 2, 3, 9], [1, 2, 3, 4]], [[1, 5, 3, 9], [1, 5, 4, 9]], [2, 3], "row 1: .* holds 9, which fills"),
        # and that the row itself shows
        ([[1, 2, 3, 4, 9]], [[1, 5, 4, 9, 9]], [3], "row 0: .* the corrupt prompt is shorter"),
        # the two differ where both should have ended
        ([[1, 2, 3, 4, 9]], [[1, 2, 5, 4, 6]], [3], "row 0: .* differ after position 3"),
        # last_position forgotten, or beyond the end
        ([[0, 1, 2, 3], [0, 1, 2, 0]], [[0, 5, 2, 3], [0, 5, 2, 0]], None, "row 1: .* give last_position"),
        ([[1, 2, 3, 9], [1, 2, 9, 9]], [[1, 5, 3, 9], [1, 5, 9, 9]], [2, 2], "row 1: .* hold 9, which fills"),
    ],
)
def test_a_prompt_read_at_padding_is_refused(clean, corrupt, last, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(clean, corrupt, last)


@pytest.mark.parametrize(
    ("clean", "corrupt", "last"),
    [
        ([[0, 1, 2, 3, 4, 0, 1]], [[0, 1, 2, 5, 4, 0, 1]], None),  # recall: BOS, pairs, EOS, the key
        ([[7, 1, 8, 2, 7]], [[7, 1, 8, 2, 8]], None),  # a key as first and last token, and another one
        ([[7, 1, 8, 2, 7], [8, 2, 7, 1, 7]], [[7, 1, 8, 2, 8], [8, 2, 7, 1, 8]], None),
        ([[7, 1, 8, 2, 7], [7, 1, 8, 2, 8]], [[7, 9, 8, 2, 7], [7, 9, 8, 2, 8]], None),
        ([[0, 1, 2, 0], [0, 3, 4, 0]], [[0, 5, 2, 0], [0, 5, 4, 0]], None),  # every prompt ends in EOS
        ([[2, 3, 4, 5]], [[3, 4, 5, 6]], None),  # a sequence to continue
        ([[0, 2, 3, 4, 5]], [[0, 3, 4, 5, 6]], None),
        ([[1, 2, 3, 4, 5], [1, 2, 6, 7, 8]], [[1, 9, 3, 4, 5], [1, 2, 3, 7, 8]], [4, 2]),  # read within a text
        ([[1, 1, 1], [2, 2, 2]], [[3, 1, 1], [3, 2, 2]], None),
        ([[0, 1, 0, 0], [0, 1, 2, 0]], [[0, 5, 0, 0], [0, 5, 2, 0]], [1, 2]),
    ],
)
def test_a_prompt_may_end_in_any_token(clean, corrupt, last) -> None:
    pairs = pairs_of(clean, corrupt, last)
    assert all(len(pairs[row]) == 1 and len(replace(pairs[row])) == 1 for row in range(len(pairs)))


def test_the_models_tokenizer_shows_what_pads(model) -> None:
    eos = model.tokenizer.pad_token_id
    pairs = pairs_of([[5, 6, 7, 8]], [[5, 9, 8, eos]])  # no BOS in front
    for use in (lambda: Readout.of(pairs) and circuits.eap(model, pairs), lambda: circuits.exact_effects(model, pairs)):
        with pytest.raises(ValueError, match=r"row 0: .* differ in length; .* which the model's tokenizer pads with"):
            use()


# ---------------------------------------------------------------------------------------------------------------------
# IOI
# ---------------------------------------------------------------------------------------------------------------------


def test_ioi_prompts_are_pairs(ioi: IOIDataset) -> None:
    assert isinstance(ioi, PromptPairs) and isinstance(ioi[2:4], IOIDataset)
    assert list(ioi.marks) == ["n1", "n2", "n3", "n4", "n5"] and list(ioi.groups) == ["corruption", "template"]
    assert torch.equal(torch.stack(list(ioi.marks.values()), dim=1), ioi.name_positions)
    assert ioi.groups == {"corruption": ioi.corruptions, "template": ioi.templates}
    assert torch.equal(ioi.positions_of("n1+1"), ioi.name_positions[:, 0] + 1)
    moved = replace(ioi, name_positions=ioi.name_positions + 1)
    assert torch.equal(moved.marks["n3"], ioi.name_positions[:, 2] + 1)
    renamed = replace(ioi, corruptions=["other"] * len(ioi))
    assert renamed.groups["corruption"] == ["other"] * len(ioi) and len(renamed.select(corruption="other")) == len(ioi)
    assert len(renamed.select()) == len(ioi), "labels of one's own are no reason to leave rows out"
    more = replace(ioi, marks=ioi.marks | {"and": ioi.name_positions[:, 0] + 1}, groups={"half": [0, 1] * 6})
    assert list(more.marks) == ["n1", "n2", "n3", "n4", "n5", "and"] and len(more.select(half=1)) == 6
    assert list(more[:2].marks) == list(more.marks) and len(more.select(None, ioi.corruptions[0], half=[0, 1])) > 0


def test_ioi_data_that_do_not_fit(ioi: IOIDataset) -> None:
    absent = 5
    assert not (ioi.candidates == absent).any()
    rows = len(ioi)

    def changed(column: torch.Tensor, row: int, value) -> torch.Tensor:
        column = column.clone()
        column[row] = value
        return column

    shorter = ioi.corrupt_tokens.clone()
    shorter[4, 13:-1], shorter[4, -1] = ioi.corrupt_tokens[4, 14:], 0
    for changes, message in (
        ({"answers": changed(ioi.answers, 3, absent)}, "row 3 of answers: 5 is not among the row's candidates"),
        ({"corrupt_answers": changed(ioi.corrupt_answers, 1, absent)}, "row 1 of corrupt_answers: 5 is not among"),
        ({"corrupt_answers": ioi.answers}, "row 0 of corrupt_answers: .* are the clean prompt's answers too"),
        ({"last_position": torch.full((rows,), -1)}, "row 0 of last_position: -1 is no position"),
        ({"last_position": changed(ioi.last_position, 2, 20)}, "row 2 of last_position: 20 is no position"),
        ({"last_position": ioi.last_position[:-1]}, "row 11 of last_position is missing"),
        ({"last_position": changed(ioi.last_position, 5, 3)}, "row 5 of name_positions: 5 is no position"),
        ({"corrupt_tokens": shorter}, "row 4: .* the corrupt prompt is shorter"),
        ({"corrupt_tokens": ioi.corrupt_tokens.float()}, "row 0 of corrupt_tokens: 0.0 is torch.float32"),
        ({"answers": ioi.answers[:-1]}, "row 11 of answers is missing"),
        ({"candidates": ioi.candidates[:, :2]}, "not among the row's candidates"),
        ({"name_positions": changed(ioi.name_positions, 1, -1)}, "row 1 of name_positions: -1 is no position"),
        ({"name_positions": ioi.name_positions[:, :4]}, r"name_positions must be \[B, 5\]"),
        ({"name_positions": ioi.name_positions[:3]}, "row 3 of name_positions is missing"),
        ({"templates": ioi.templates[:-2]}, "row 10 of templates is missing"),
        ({"templates": "one"}, "templates must be a list with one label a row, not 'one'"),
        ({"corruptions": [None] * rows}, "row 0 of corruptions: .* not None"),
        ({"corruptions": list(range(rows))}, "row 0 of corruptions: 0 is no text"),
        ({"clean_text": ["a"]}, "row 1 of clean_text is missing"),
        ({"corrupt_text": None}, "corrupt_text must be a list"),
        ({"marks": {"n1": ioi.name_positions[:, 1]}}, "'n1' is .* but name_positions says"),
        ({"groups": {"template": ["x"] * rows}}, "'template' is .* but templates says"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(ioi, **changes)
        columns = {name: getattr(ioi, name) for name, field in ioi.__dataclass_fields__.items() if field.init}
        with pytest.raises(ValueError, match=message):
            IOIDataset(**columns | changes)


def test_ioi_selects_what_it_knows(ioi: IOIDataset) -> None:
    assert len(ioi.select(template=TEMPLATES[2])) == 0
    both = ioi.select(corruption=[CORRUPTIONS[0], CORRUPTIONS[1]])
    assert set(both.corruptions) <= set(CORRUPTIONS[:2])
    with pytest.raises(ValueError, match="no group 'place'"):
        ioi.select(place="store")


# ---------------------------------------------------------------------------------------------------------------------
# Where data and a model meet
# ---------------------------------------------------------------------------------------------------------------------


def test_each_row_is_read_at_its_own_end(model) -> None:
    """Rows of different lengths, against plain runs of each prompt alone and without padding."""
    data = IOIDataset.generate(model.tokenizer, 8, seed=5, templates="all")
    lasts = data.last_position.tolist()
    assert len(set(lasts)) == 2
    readout = Readout.of(data)
    found = sweep(model, data.clean_tokens, [[], [Resample("embed", None)]], readout, source=data.corrupt_tokens)
    for row, last in enumerate(lasts):
        for run, tokens in ((0, data.clean_tokens), (1, data.corrupt_tokens)):
            with torch.no_grad():
                logits = model._module(tokens[row : row + 1, : last + 1]).logits[0, -1]
            names = data.candidates[row][data.candidates[row] >= 0]
            torch.testing.assert_close(found[run, row, : len(names)], logits[names], rtol=0, atol=2e-4)
            assert int(data.candidates[row, readout.corrupt_answers[row]]) == int(data.corrupt_answers[row])
            assert int(data.candidates[row, readout.answers[row]]) == int(data.answers[row])


def test_effects_of_pairs_of_any_task(model, ioi: IOIDataset) -> None:
    """Circuits take pairs without names, and give what they give for the same prompts as an `IOIDataset`."""
    pairs = PromptPairs(
        clean_tokens=ioi.clean_tokens,
        corrupt_tokens=ioi.corrupt_tokens,
        answers=ioi.answers,
        corrupt_answers=ioi.corrupt_answers,
    )
    one, other = (circuits.eap(model, data, steps=1).table for data in (pairs, ioi))
    torch.testing.assert_close(torch.tensor(one["score"].to_numpy()), torch.tensor(other["score"].to_numpy()))


def test_tokens_outside_the_vocabulary(model, ioi: IOIDataset) -> None:
    size = model.vocab_size
    answers, candidates = ioi.answers.clone(), ioi.candidates.clone()
    candidates[2, candidates[2] == answers[2]] = size
    answers[2] = size
    beyond = replace(ioi, answers=answers, candidates=candidates)
    message = f"row 2 of answers: {size} is outside the vocabulary, whose tokens are 0 to {size - 1}"
    for use in (
        lambda: experiments.resample_ablation(model, beyond, layers=1, positions=3, progress=False),
        lambda: experiments.layer_removal(model, beyond, progress=False),
        lambda: experiments.greedy_layer_removal(model, beyond, progress=False),
        lambda: experiments.cross_talk(model, beyond, progress=False),
        lambda: experiments.conv_slices(model, beyond, 1, progress=False),
        lambda: mamba_ioi.bottleneck(model, beyond),
        lambda: circuits.eap(model, beyond),
        lambda: circuits.evaluate(model, beyond, circuits.Circuit.of(model, [("embed", "output")])),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match=f"row 2 of the readout's tokens: {size} is outside the vocabulary"):
        sweep(model, ioi.clean_tokens, [[]], Readout.of(beyond))


def test_sets_of_one_answer_are_that_answer(model, ioi: IOIDataset) -> None:
    sets = replace(ioi, answers=ioi.answers[:, None])
    for use in (
        lambda pairs: circuits.eap(model, pairs, steps=1).table["score"].tolist(),
        lambda pairs: experiments.layer_removal(model, pairs, progress=False).table["probability"].tolist(),
        lambda pairs: experiments.resample_ablation(model, pairs, layers=1, progress=False).table["effect"].tolist(),
    ):
        assert use(sets) == pytest.approx(use(ioi), abs=1e-6)
    logits = torch.rand(12, model.vocab_size)
    assert torch.equal(
        metrics.logit_diff(logits, sets.answers, sets.corrupt_answers),
        metrics.logit_diff(logits, ioi.answers, ioi.corrupt_answers),
    )


READ = {
    "tokens": torch.tensor([[3, 4, 5], [6, 7, 0]]),
    "last": torch.tensor([2, 1]),
    "answers": torch.tensor([0, 1]),
    "corrupt_answers": torch.tensor([1, 0]),
    "candidates": torch.tensor([[0, 1, 2], [1, 0, -1]]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": READ["tokens"].float()}, "row 0 of tokens: 3.0 is torch.float32"),
        ({"tokens": READ["tokens"][0]}, r"tokens .* \[B, n\], not of shape \(3,\)"),
        ({"tokens": READ["tokens"] - 4}, "row 0 of tokens: -1 is no token id"),
        ({"tokens": READ["tokens"][:1]}, "row 1 of last is too much"),
        ({"tokens": READ["tokens"][:, :1]}, "row 1 of answers: 1 is no column of tokens, which are 0 to 0"),
        ({"last": [2, -1]}, "row 1 of last: -1 is no position"),
        ({"last": [2]}, "row 1 of last is missing"),
        ({"last": None}, "last must be whole numbers"),
        ({"answers": [0, 3]}, "row 1 of answers: 3 is no column of tokens, which are 0 to 2"),
        ({"answers": [-1, 0]}, "row 0 of answers: -1 is no column"),
        ({"answers": [0, 2]}, "row 1 of answers: 2 is not among the row's candidates"),
        ({"answers": [0.0, 1.0]}, "row 0 of answers: 0.0 is torch.float64"),
        ({"corrupt_answers": [1, 5]}, "row 1 of corrupt_answers: 5 is no column"),
        ({"corrupt_answers": torch.ones(2, 1, 1).long()}, r"corrupt_answers .* \[B, n\], not of shape \(2, 1, 1\)"),
        ({"candidates": [[0, 1, 3], [1, 0, -1]]}, "row 0 of candidates: 3 is no column"),
        ({"candidates": [[0, 1, -2], [1, 0, -1]]}, "row 0 of candidates: -2 is no column"),
        ({"candidates": [[0, 1, 1], [1, 0, -1]]}, "row 0 of candidates: token 1 is named twice"),
        ({"candidates": [[0, 1, 2]]}, "row 1 of candidates is missing"),
        ({"candidates": [[True, False], [True, False]]}, "row 0 of candidates: True is no whole number"),
    ],
)
def test_readouts_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Readout(**READ | changes)
    with pytest.raises(ValueError, match=message):
        replace(Readout(**READ), **changes)


def test_readouts_of_other_prompts(small, tokens) -> None:
    assert Readout(**{name: column.tolist() for name, column in READ.items()}).tokens.dtype == torch.long
    for prompts, readout, message in (
        (tokens[:3], Readout(**READ), "row 2 of the readout is missing: it has 2 rows, tokens has 3"),
        (tokens[:1], Readout(**READ), "row 1 of the readout is too much"),
        (tokens[:2, :2], Readout(**READ), "row 0 of the readout's last: 2 is no position of prompts of 2 tokens"),
        (tokens[:2], Readout(**READ | {"tokens": READ["tokens"] + 57}), "row 0 of the readout's tokens: 61 is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(small, prompts, [[]], readout)


def test_labels_of_ones_own_are_labels_everywhere(model, ioi: IOIDataset) -> None:
    """Templates and corruptions that are not the paper's group the same numbers."""
    some = ioi.select(template=ioi.templates[0])[:2]
    own = replace(some, templates=["mine"] * len(some), corruptions=["AB -> BA"] * len(some))
    table = experiments.resample_ablation(model, own, layers=1, positions=[3, 5], progress=False).table
    assert set(table["corruption"]) == {"AB -> BA"} and set(table["n"]) == {len(own)}
    steps = experiments.cross_talk(model, own, progress=False).table
    assert set(steps["template"]) == {"mine"} and set(steps["corruption"]) == {"AB -> BA"}
    both = replace(ioi, corruptions=["one"] * len(ioi))
    expected = experiments.resample_ablation(model, both, layers=1, positions=[3], progress=False).table
    parts = experiments.resample_ablation(model, ioi, layers=1, positions=[3], progress=False).table
    mean = (parts["effect"] * parts["n"]).sum() / parts["n"].sum()
    assert float(expected["effect"].iloc[0]) == pytest.approx(mean, abs=1e-6)
