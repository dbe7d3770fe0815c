"""The tasks: each row's answers and marks by a parse of its own prompts, the draw, the options, and tasks in use."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import mamba_ioi
from mamba_ioi import IOIDataset, PromptPairs, experiments, metrics
from mamba_ioi.cli import main
from mamba_ioi.models.model import wrap
from mamba_ioi.result import Result
from mamba_ioi.tasks import TASKS, Task, generate, register
from mamba_ioi.tasks.words import fill, sample, single_tokens, vocabulary
from mamba_ioi.zoo.tokenizer import build_tokenizer

from . import plain
from .conftest import random_mamba
from .task_tokenizer import BOS, task_tokenizer, with_pieces, without_spaces

NAMES = ["agreement", "capitals", "colors", "docstring", "gender", "greater_than", "induction", "ioi", "recall"]


@dataclass
class Row:
    """A row in texts: the prompts' tokens without BOS, and what continues them."""

    clean: list[str]
    corrupt: list[str]
    right: set[str]
    wrong: set[str]
    candidates: set[str]
    marks: dict[str, str]
    groups: dict[str, object]

    @property
    def texts(self) -> tuple[str, str]:
        return "".join(self.clean), "".join(self.corrupt)

    @property
    def changed(self) -> list[int]:
        """Where the prompts differ."""
        return [i for i, (one, other) in enumerate(zip(self.clean, self.corrupt, strict=True)) if one != other]


def in_texts(pairs: PromptPairs, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    def texts(ids: torch.Tensor) -> list[str]:
        return [str(tokenizer.decode([token])) for token in ids.tolist() if token >= 0]

    rows = []
    for row, end in enumerate(pairs.last_position.tolist()):
        assert {int(pairs.clean_tokens[row, 0]), int(pairs.corrupt_tokens[row, 0])} == {tokenizer.bos_token_id}
        right, wrong = pairs.answer_sets
        rows.append(
            Row(
                clean=texts(pairs.clean_tokens[row, 1 : end + 1]),
                corrupt=texts(pairs.corrupt_tokens[row, 1 : end + 1]),
                right=set(texts(right[row])),
                wrong=set(texts(wrong[row])),
                candidates=set(texts(pairs.candidates[row])),
                marks={name: texts(pairs.clean_tokens[row, at[row]][None])[0] for name, at in pairs.marks.items()},
                groups={name: labels[row] for name, labels in pairs.groups.items()},
            )
        )
    return rows


@pytest.fixture(scope="module", params=["words", "GPT-NeoX"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "words":
        return task_tokenizer()
    file = Path(__file__).resolve().parents[2] / "shared" / "data" / "20B_tokenizer.json"
    if not file.is_file():
        pytest.skip(f"GPT-NeoX's tokenizer is not there: {file}")
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=end, eos_token=end)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerFast:
    return build_tokenizer()


# ---------------------------------------------------------------------------------------------------------------------
# What each task calls for, from its prompts alone
# ---------------------------------------------------------------------------------------------------------------------

SINGULAR = {" is", " was", " has", " does", " seems", " looks", " needs"}
PLURAL = {" are", " were", " have", " do", " seem", " look", " need"}


def of_agreement(row: Row) -> None:
    for tokens, answers in ((row.clean, row.right), (row.corrupt, row.wrong)):
        the, subject, _, also, _ = tokens
        assert (the, also) == ("The", " the")
        assert answers == (PLURAL if subject.endswith("s") else SINGULAR)
    assert row.changed == [1] and row.marks == {"subject": row.clean[1]}
    numbers = ["plural" if row.clean[place].endswith("s") else "singular" for place in (1, 4)]
    assert list(row.groups.values()) == numbers and {row.clean[1], row.clean[1] + "s"} & {row.corrupt[1]} != {
        row.clean[4]
    }
    assert {one.removesuffix("s") for one in (row.clean[1], row.corrupt[1])} == {row.clean[1].removesuffix("s")}


SEATS = {"Paris": "France", "Berlin": "Germany", "Rome": "Italy", "Tokyo": "Japan", "Cairo": "Egypt", "Oslo": "Norway"}
SEATS |= {"Lima": "Peru", "Kabul": "Afghanistan", "Bern": "Switzerland", "Rabat": "Morocco", "Ottawa": "Canada"}


def of_capitals(row: Row) -> None:
    for text, (answer,) in zip(row.texts, (row.right, row.wrong), strict=True):
        (city,) = re.fullmatch(r"We flew to (\w+), the capital of", text).groups()
        assert SEATS.get(city, answer[1:]) == answer[1:]
        assert (city in SEATS) or answer[1:] not in SEATS.values()
        if text == row.texts[0]:
            assert f" {city}".startswith(row.marks["city"]) and city.endswith(row.marks["city_end"].strip())
            assert row.groups["tokens"] == len(row.clean) - 7
    assert row.right | row.wrong < row.candidates


def of_colors(row: Row) -> None:
    found = []
    for text, answer in zip(row.texts, (row.right, row.wrong), strict=True):
        said = dict(re.findall(r"The (\w+) is (\w+)\.", text))
        asked = re.search(r"What color is the (\w+)\? It is$", text)[1]
        assert answer == {f" {said[asked]}"} and len(said) == len(set(said.values())) == 3
        found.append((said, asked))
    (clean, asked), (corrupt, same) = found
    assert asked == same and list(clean) == list(corrupt) and set(clean.values()) == set(corrupt.values())
    other = next(thing for thing in clean if clean[thing] == corrupt[asked])
    marks = {"object": asked, "color": clean[asked], "other_color": clean[other], "asked": asked}
    assert row.marks == {name: f" {word}" for name, word in marks.items()}
    assert row.groups == {"asked": 1 + list(clean).index(asked)} and row.candidates == {f" {c}" for c in clean.values()}


def of_docstring(row: Row) -> None:
    listed = []
    for text, answer in zip(row.texts, (row.right, row.wrong), strict=True):
        listed.append(re.match(r"def \w+\(self, ([\w, ]+)\):\n", text)[1].split(", "))
        documented = re.findall(r"^    :param (\w+): \w+ \w+$", text, re.M)
        assert text.endswith("\n    :param") and documented == listed[-1][1:3]
        assert answer == {f" {listed[-1][listed[-1].index(documented[-1]) + 1]}"}
    assert row.candidates == {f" {name}" for name in listed[0] + listed[1]} and len(row.candidates) == 10
    places = ["before", "first", "second", "third", "after"]
    assert row.marks == {
        name: f" {listed[0][places.index(name.removesuffix('_doc'))]}" for name in (*places, "first_doc", "second_doc")
    }
    blank = [re.sub(rf"\b({'|'.join(names)})\b", "x", text) for names, text in zip(listed, row.texts, strict=True)]
    assert blank[0] == blank[1]


WOMEN = {"caregiver", "cleaner", "counselor", "dancer", "maid", "model", "nurse", "secretary", "singer", "teacher"}
WOMEN |= {"therapist", "tutor", "woman"}


def of_gender(row: Row) -> None:
    for text, answer in zip(row.texts, (row.right, row.wrong), strict=True):
        person = re.fullmatch(r"The (\w+) \w+ that", text)[1]
        assert answer == ({" she"} if person in WOMEN else {" he"})
    assert row.corrupt[1] == (" man" if row.groups["stereotype"] == "female" else " woman") and row.changed == [1]
    assert row.marks == {"person": row.clean[1], "verb": row.clean[2]}


def of_greater_than(row: Row) -> None:
    clean, corrupt = (re.search(r"the year (\d\d)(\d\d) to the year (\d\d)$", text).groups() for text in row.texts)
    assert clean[0] == clean[2] == corrupt[0] == corrupt[2] and corrupt[1] == "01"
    assert row.right == {f"{y:02d}" for y in range(100) if y > int(clean[1])}
    assert row.wrong == {f"{y:02d}" for y in range(100) if y <= int(clean[1])}
    event = re.match(r"The( \w+) went on", row.texts[0])[1]
    assert row.marks == {"event": event, "xx": f" {clean[0]}", "yy": clean[1]} and len(row.changed) == 1


def of_induction(row: Row) -> None:
    for tokens, answer in ((row.clean, row.right), (row.corrupt, row.wrong)):
        assert len(set(tokens)) == len(tokens) - 1 == 18
        assert answer == {tokens[tokens.index(tokens[-1]) + 1]}
    assert row.changed == [9] and row.marks == {"a": row.clean[-1], "b": row.clean[9]}
    assert row.candidates == {*row.clean, *row.corrupt}


def of_ioi(row: Row) -> None:
    names = [row.marks[f"n{slot}"] for slot in range(1, 6)]
    assert row.right == {name for name in names if names.count(name) == 1}
    assert row.groups["corruption"] in mamba_ioi.tasks.ioi.CORRUPTIONS


def looked_up(tokens: list[str], pairs: int) -> tuple[str | None, list[str]]:
    """The value of the last query in a prompt of recall, and the values before; earlier queries are answered right."""
    context, queries = tokens[: 2 * pairs], tokens[2 * pairs + 1 :]
    known = dict(zip(context[::2], context[1::2], strict=True))
    assert len({*context}) == 2 * pairs
    for key, value in zip(queries[:-1:2], queries[1::2], strict=True):
        assert known[key] == value
    assert len({*queries[::2]}) == len(queries[::2])
    return known.get(queries[-1]), context[1::2]


def of_recall(row: Row) -> None:
    value, values = looked_up(row.clean, 8)
    other, others = looked_up(row.corrupt, 8)
    assert row.right == {value} and row.wrong == {other} and other not in values and value not in others
    assert row.candidates == {*values, *others}
    at = row.clean.index(row.clean[-1])
    assert row.changed == [at + 1] and row.groups == {"asked": at // 2 + 1}
    assert row.marks == {"key": row.clean[-1], "value": value, "divider": row.clean[16]}


CHECKS: dict[str, Callable[[Row], None]] = {name: globals()[f"of_{name}"] for name in NAMES}
METRICS = dict.fromkeys(NAMES, "logit_diff") | {"ioi": "nld", "docstring": "margin", "greater_than": "prob_diff"}


def test_the_tasks_are_there() -> None:
    assert list(TASKS) == NAMES
    for name, task in TASKS.items():
        assert isinstance(task, Task) and task.name == name and "arXiv" in task.source


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_marks_by_a_parse_of_the_prompts(name, tokenizer) -> None:
    pairs = generate(name, tokenizer, 400)
    rows = in_texts(pairs, tokenizer)
    assert len(rows) == 400 and isinstance(pairs, IOIDataset if name == "ioi" else PromptPairs)
    assert len({row.texts for row in rows}) >= {"gender": 330}.get(name, 395)
    assert pairs.metric == METRICS[name]
    for row in rows:
        assert row.right.isdisjoint(row.wrong) and len(row.clean) == len(row.corrupt)
        CHECKS[name](row)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_one_token_as_they_continue_the_prompt(name, tokenizer) -> None:
    """The prompts and answers as texts, read anew."""
    pairs = generate(name, tokenizer, 12, seed=4)
    for row, texts in enumerate(in_texts(pairs, tokenizer)):
        end = int(pairs.last_position[row]) + 1
        for text, answers, tokens in zip(
            texts.texts, (texts.right, texts.wrong), (pairs.clean_tokens, pairs.corrupt_tokens), strict=True
        ):
            prompt = tokens[row, 1:end].tolist()
            for answer in answers:
                ids = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
                assert ids[:-1] == prompt and ids[-1] in pairs.candidates[row]


# ---------------------------------------------------------------------------------------------------------------------
# The draw
# ---------------------------------------------------------------------------------------------------------------------

HASHES = {
    "agreement": "7381b3c241884826",
    "capitals": "a0c64a430591513a",
    "colors": "5ea6e78d123c24a7",
    "docstring": "8e12bfb56be01799",
    "gender": "2e1cdd249ce5f6c8",
    "greater_than": "8b30965114acb0b0",
    "induction": "0e0839418953276c",
    "ioi": "60ad4654e6b37c87",
    "recall": "598ced05720a9664",
}


def digest(pairs: PromptPairs) -> str:
    """SHA-256 of all that the pairs hold, its beginning."""
    names = ("clean_tokens", "corrupt_tokens", "answers", "corrupt_answers", "candidates", "last_position")
    held = [getattr(pairs, name).tolist() for name in names]
    held += [{name: positions.tolist() for name, positions in pairs.marks.items()}, dict(pairs.groups)]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_pairs_everywhere(name) -> None:
    pairs = generate(name, task_tokenizer(), 20, seed=5)
    assert digest(pairs) == HASHES[name]
    assert in_texts(generate(name, task_tokenizer(), 6, seed=5), task_tokenizer()) == in_texts(
        pairs[:6], task_tokenizer()
    )
    assert digest(generate(name, task_tokenizer(), 20, seed=6)) != HASHES[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_the_first_row_that_is_drawn(name, tiny) -> None:
    tokenizer = tiny if name in ("induction", "ioi", "recall") else task_tokenizer()
    (row,) = in_texts(generate(name, tokenizer, 1), tokenizer)
    example = TASKS[name].example
    assert row.texts == (example["clean"], example["corrupt"])
    for answers, found in ((example["answer"], row.right), (example["corrupt_answer"], row.wrong)):
        assert {answers} == found if isinstance(answers, str) else set(answers) == found


def test_a_pair_comes_twice_only_where_hardly_any_other_is_left(tiny) -> None:
    """Gender has 12 professions and 30 verbs."""
    pairs = generate("gender", task_tokenizer(), 300)
    assert len({tuple(row) for row in pairs.clean_tokens.tolist()}) > 290
    assert len({tuple(row) for row in generate("gender", task_tokenizer(), 1000).clean_tokens.tolist()}) == 360
    assert len(generate("recall", tiny, 30, pairs=1, keys=[" store"], values=[" kiss", " bone"])) == 30


def test_draws_are_uniform() -> None:
    import random

    rng = random.Random(0)
    counts: dict[tuple, int] = {}
    for _ in range(6000):
        drawn = tuple(sample(rng, "abc", 2))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6 and all(850 < count < 1150 for count in counts.values())
    with pytest.raises(ValueError, match="4 of 3 cannot be drawn"):
        sample(rng, "abc", 4)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "queries"), [(4, 1), (5, 3), (3, 3)])
@pytest.mark.parametrize("change", ["value", "key"])
def test_recall_with_several_queries(pairs: int, queries: int, change: str) -> None:
    tokenizer = task_tokenizer()
    found = generate("recall", tokenizer, 80, pairs=pairs, queries=queries, change=change, keys=20, values=30)
    keys, values = set(), set()
    for row in in_texts(found, tokenizer):
        assert len(row.clean) == 2 * pairs + 2 * queries and row.clean[2 * pairs] == "<eos>"
        value, context = looked_up(row.clean, pairs)
        at = row.clean.index(row.clean[-1])
        assert row.right == {value} and row.marks["value"] == value and row.marks["key"] == row.clean[-1]
        for number in range(1, queries):
            assert row.marks[f"query{number}"] == row.clean[2 * pairs - 1 + 2 * number]
        (wrong,) = row.wrong
        other, _ = looked_up(row.corrupt, pairs)
        if change == "value":
            assert row.changed == [at + 1] and other == wrong and wrong not in context
        else:
            assert row.changed == [at] and other is None and wrong in {*context} - {value}
            keys.add(row.corrupt[at])
        keys |= {*row.clean[: 2 * pairs : 2]}
        values |= {*context, wrong}
    assert len(keys) == 20 and len(values) == 30 and keys.isdisjoint(values)


def test_recall_takes_keys_values_and_a_divider(tiny) -> None:
    tokenizer = task_tokenizer(eos=BOS)
    assert {row.clean[16] for row in in_texts(generate("recall", tokenizer, 5), tokenizer)} == {"."}, "EOS is BOS"
    assert {row.clean[16] for row in in_texts(generate("recall", tiny, 5, divider=","), tiny)} == {","}
    given = {"keys": [" red", " blue", " green"], "values": [" actor", " bird", " boat", " book"], "pairs": 3}
    for row in in_texts(generate("recall", tokenizer, 20, **given), tokenizer):
        assert {*row.clean[:6:2]} == {*given["keys"]} and {*row.clean[1:6:2], *row.wrong} == {*given["values"]}
    half = generate("recall", tokenizer, 300, keys=[" red"], pairs=1)
    assert tokenizer.convert_tokens_to_ids(" red") not in half.answers.tolist(), "a key is no value"


def test_the_words_of_keys_and_values_do_not_depend_on_the_seed() -> None:
    tokenizer = task_tokenizer()
    kinds = []
    for seed in (1, 2):
        rows = in_texts(generate("recall", tokenizer, 200, seed=seed, keys=12, values=12, pairs=6), tokenizer)
        kinds.append(
            ({word for row in rows for word in row.clean[:12:2]}, {w for row in rows for w in row.clean[1:12:2]})
        )
    assert kinds[0] == kinds[1] and all(len(kind) == 12 for kind in kinds[0])


def test_other_options() -> None:
    tokenizer = task_tokenizer()
    for row in in_texts(generate("induction", tokenizer, 10, before=0, between=3), tokenizer):
        assert len(row.clean) == 6 and row.clean[0] == row.clean[5] and row.right == {row.clean[1]}
    assert all(
        row.clean[0] == row.clean[2]
        for row in in_texts(generate("induction", tokenizer, 3, before=0, between=0), tokenizer)
    )
    for row in in_texts(generate("colors", tokenizer, 10, objects=5), tokenizer):
        assert len(row.candidates) == 5
    for kind in ("same", "other"):
        for row in in_texts(generate("agreement", tokenizer, 30, attractor=kind), tokenizer):
            assert (row.groups["number"] == row.groups["attractor"]) == (kind == "same")
            of_agreement(row)
    rows = in_texts(generate("gender", tokenizer, 100, stereotype="both"), tokenizer)
    assert {str(row.groups["stereotype"]) for row in rows} == {"female", "male"}
    for row in rows:
        of_gender(row)
    assert generate("gender", tokenizer, 5, stereotype="male").labels_of("stereotype") == ["male"]


def test_ioi_has_as_many_rows_as_are_asked_for(tiny) -> None:
    pairs = generate("ioi", tiny, 7, seed=3, templates="all", corruptions="ABC AB C -> ABD AB D")
    same = IOIDataset.generate(tiny, 7, seed=3, templates="all", corruptions="ABC AB C -> ABD AB D", symmetric=False)
    assert digest(pairs) == digest(same)
    both = generate("ioi", tiny, 6, symmetric=True)
    assert len(both) == 6 and both.clean_text[3:] == both.corrupt_text[:3]
    with pytest.raises(ValueError, match="n_pairs=7 is odd"):
        generate("ioi", tiny, 7, symmetric=True)


BAD: list[tuple[tuple, dict, str]] = [
    (("banana", None, 3), {}, "there is no task 'banana'; there are agreement, capitals, .*recall"),
    ((3, None, 3), {}, "there is no task 3"),
    (("gender", None, 3), {}, "transformers tokenizer, not with None"),
    (("gender", "words", 0), {}, "n_pairs must be a whole number of at least 1, not 0"),
    (("gender", "words", True), {}, "n_pairs"),
    (("gender", "words", 3), {"seed": -1}, "seed must be a whole number of at least 0, not -1"),
    (("gender", "words", 3), {"seed": 1.5}, "seed"),
    (("gender", "words", 3), {"verb": "said"}, "gender has no option 'verb'; it has stereotype='female'"),
    (("docstring", "words", 3), {"pairs": 3}, "docstring has no option 'pairs'; it has none"),
    (("gender", "words", 3), {"stereotype": "old"}, "stereotype is one of 'female', 'male', 'both', not 'old'"),
    (("agreement", "words", 3), {"attractor": 1}, "attractor is one of 'any', 'same', 'other', not 1"),
    (("colors", "words", 3), {"objects": 1}, "objects must be a whole number from 2 to"),
    (("ioi", "words", 3), {"symmetric": 1}, "symmetric is True or False, not 1"),
    (("ioi", "words", 3), {"templates": "none"}, "the task ioi: unknown template 'none'"),
    (("induction", "words", 3), {"before": -1}, "before must be"),
    (("induction", "words", 3), {"between": 9999}, "of words of four letters or more the tokenizer has .*10010 are"),
    (("recall", "words", 3), {"change": "query"}, "change is one of 'value', 'key', not 'query'"),
    (("recall", "words", 3), {"pairs": 2, "queries": 3}, "queries must be a whole number from 1 to 2, not 3"),
    (("recall", "words", 3), {"pairs": 1, "change": "key"}, "2 pairs at least"),
    (("recall", "words", 3), {"keys": 7}, "of the keys the tokenizer has 7 as single tokens.*8 are needed"),
    (("recall", "words", 3), {"values": 8}, "of the values .* 9 are needed"),
    (("recall", "words", 3), {"keys": 10**6}, "keys are to be 1000000, and the tokenizer has"),
    (("recall", "words", 3), {"keys": " red"}, "keys are a whole number or a list of texts, not ' red'"),
    (("recall", "words", 3), {"keys": [" red", "redd"]}, "keys: the tokenizer has no single token for 'redd'"),
    (("recall", "words", 3), {"keys": [3]}, "keys: 3 is no text of one token"),
    (("recall", "words", 3), {"keys": [" red"], "values": [" red"]}, "' red' is among the keys and among the values"),
    (("recall", "words", 3), {"divider": "redd"}, "divider: the tokenizer has no single token for 'redd'"),
    (
        ("capitals", "tiny", 3),
        {},
        "capitals: of the countries the tokenizer has 1 as single tokens.*'Turkey'.*2 are needed",
    ),
    (("colors", "tiny", 3), {}, "of the colors the tokenizer has 0"),
    (("docstring", "tiny", 3), {}, "of the names of arguments the tokenizer has 0"),
    (("agreement", "tiny", 3), {}, "of the nouns with their plurals the tokenizer has 0"),
    (("gender", "tiny", 3), {}, "of the words she, he, man the tokenizer has 0"),
    (("greater_than", "tiny", 3), {}, "lacks tokens of two digits after a century, as 42 after 17"),
]


@pytest.mark.parametrize(("given", "options", "message"), BAD, ids=[f"{one[0][0]}-{i}" for i, one in enumerate(BAD)])
def test_bad_input_is_one_sentence(given, options, message, tiny) -> None:
    name, kind, n_pairs = given
    tokenizer = {"words": task_tokenizer(), "tiny": tiny}.get(kind, kind)
    with pytest.raises(ValueError, match=message) as caught:
        generate(name, tokenizer, n_pairs, **options)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def test_single_tokens_are_those_after_a_space(tiny) -> None:
    assert list(single_tokens(tiny, ["Mary", "mary", "store", "wards", "Mary", "qq"])) == ["Mary", "store"]
    tokenizer = task_tokenizer()
    found = single_tokens(tokenizer, ["red", "redd", "Paris"])
    assert found == {word: tokenizer.convert_tokens_to_ids(f" {word}") for word in ("red", "Paris")}
    assert single_tokens(tiny, []) == {}


def test_the_vocabulary_is_its_common_words_and_then_its_own(tiny) -> None:
    few, all_of_them = vocabulary(tiny, 3), vocabulary(tiny, 10**6)
    assert "store" in few and "Mary" not in few and list(all_of_them)[: len(few)] == list(few)
    assert {"Mary", "gave", "Afterwards", "wards"} & set(all_of_them) == {"Mary", "gave"}
    for word, token in all_of_them.items():
        assert tiny(f" {word}", add_special_tokens=False)["input_ids"] == [token] and len(word) >= 4


@pytest.mark.parametrize("make", [with_pieces, without_spaces])
def test_other_kinds_of_tokenizers(make) -> None:
    """Words by the pieces that stand for them, with the space before them as the tokenizer has it."""
    tokenizer = make()

    def words(ids: torch.Tensor) -> list[str]:
        pieces = tokenizer.convert_ids_to_tokens([token for token in ids.tolist() if token >= 0])
        return [str(piece).replace("▁", "").lower() for piece in pieces]

    pairs = generate("agreement", tokenizer, 20)
    for prompt, answers in zip(pairs.clean_tokens, pairs.answers, strict=True):
        _, the, subject, _, also, _ = words(prompt)
        assert the == also == "the"
        assert {f" {verb}" for verb in words(answers)} == (PLURAL if subject.endswith("s") else SINGULAR)
    pairs = generate("colors", tokenizer, 20)
    for row, prompt in enumerate(pairs.clean_tokens):
        said = words(prompt)
        assert words(pairs.answers[row][None]) == [said[said.index(said[-4]) + 2]]
        assert words(prompt[pairs.marks["asked"][row]][None]) == [said[-4]]
    pairs = generate("recall", tokenizer, 20, pairs=3)
    for row, prompt in enumerate(pairs.clean_tokens):
        said = words(prompt)
        assert len(said) == 9 and said[7] == "<eos>" and tokenizer.unk_token_id not in prompt
        assert words(pairs.answers[row][None]) == [said[said.index(said[-1]) + 1]]
    with pytest.raises(ValueError, match="the task greater_than: the tokenizer lacks tokens of two digits"):
        generate("greater_than", tokenizer, 1)
    with pytest.raises(ValueError, match=r"the task docstring: of the names of arguments the tokenizer has [0-9] as"):
        generate("docstring", tokenizer, 1)


def test_templates_know_where_their_parts_are() -> None:
    text, spans = fill("The {one} of {two}", {"one": "end", "two": "it"})
    assert text == "The end of it" and {name: text[a:b] for name, (a, b) in spans.items()} == {
        "one": "end",
        "two": "it",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tasks in use
# ---------------------------------------------------------------------------------------------------------------------

CHANGED = {"agreement": "subject", "gender": "person", "greater_than": "yy", "induction": "b", "recall": "value"}
"""Of tasks whose prompts differ in one token, the mark that stands there."""


@pytest.mark.parametrize("name", NAMES)
def test_resampling_at_the_marks(name) -> None:
    """At the start the changed token is all that differs: there the run is the corrupt one, elsewhere the clean."""
    tokenizer = task_tokenizer()
    module = random_mamba(seed=3, vocab_size=len(tokenizer))
    pairs = generate(name, tokenizer, 6, seed=2)
    marks = [*pairs.marks, "last"]
    model = wrap(module, tokenizer, model_id="random")
    table = experiments.resample_ablation(model, pairs, "resid_pre", [0], marks=marks, progress=False).table
    assert set(table["mark"]) == set(marks) and table.groupby("mark")["n"].sum().eq(6).all()
    clean, corrupt = (
        plain.last_logits(module, ids, pairs.last_position) for ids in (pairs.clean_tokens, pairs.corrupt_tokens)
    )
    if name in CHANGED:
        lost = torch.tensor([value(name, *row) for row in by_row(pairs, clean)]) - torch.tensor(
            [value(name, *row) for row in by_row(pairs, corrupt)]
        )
        effect = (table["effect"] * table["n"]).groupby(table["mark"]).sum() / 6
        assert effect[CHANGED[name]] == pytest.approx(lost.mean().item(), abs=1e-4)
        assert effect.drop(CHANGED[name]).abs().max() < 1e-4 < abs(effect[CHANGED[name]])
    right = [max(names, key=lambda token: logits[token]) in ok for logits, ok, _, names in by_row(pairs, clean)]
    found = metrics.accuracy(clean, pairs.answers, pairs.candidates)
    assert found.tolist() == [float(one) for one in right]


def by_row(pairs: PromptPairs, logits: torch.Tensor):
    """Each row's logits, answers, corrupt answers and candidates."""
    columns = [*pairs.answer_sets, pairs.candidates]
    return [
        (row, *([t for t in ids[i].tolist() if t >= 0] for ids in columns)) for i, row in enumerate(logits.double())
    ]


def value(name: str, logits: torch.Tensor, right: list[int], wrong: list[int], candidates: list[int]) -> float:
    if name == "greater_than":
        probabilities = logits.softmax(0)
        return float(probabilities[right].sum() - probabilities[wrong].sum())
    return float(logits[right].mean() - logits[wrong].mean())


def test_pairs_of_texts_are_saved_as_texts(tmp_path, tokenizer) -> None:
    for name in ("greater_than", "docstring", "recall"):
        pairs = generate(name, tokenizer, 5)
        again = PromptPairs.load(pairs.save(tmp_path / f"{name}.jsonl"), tokenizer)
        assert digest(again) == digest(pairs) and again.metric == pairs.metric
    assert '"clean": "The ' in (tmp_path / "greater_than.jsonl").read_text()


def test_a_task_of_ones_own(monkeypatch) -> None:
    """In place of a file, it is registered; what it gives is looked at."""
    monkeypatch.setattr(mamba_ioi.tasks, "TASKS", TASKS.copy())
    example = {"clean": "red", "corrupt": "blue", "answer": " red", "corrupt_answer": " blue"}

    def echo(tokenizer, n_pairs: int, seed: int, *, less: int = 0) -> PromptPairs:
        return PromptPairs.from_records(tokenizer, [example] * (n_pairs - less))

    register(Task(name="echo", about="the word again", function=echo, source="none", example=example))
    assert mamba_ioi.tasks.TASKS["echo"].options == {"less": 0} and "echo" not in TASKS
    assert len(generate("echo", task_tokenizer(), 3)) == 3
    with pytest.raises(
        ValueError, match=r"the task echo should give PromptPairs of 3 rows; it gave PromptPairs\(2 rows"
    ):
        generate("echo", task_tokenizer(), 3, less=1)


def test_a_word_that_the_tokenizer_does_not_know_is_named() -> None:
    from mamba_ioi.tasks.task import draw_pairs

    row = {"clean": "red quux", "corrupt": "blue quux", "answer": " red", "corrupt_answer": " blue"}
    with pytest.raises(ValueError, match="does not know 'quux', which the prompts need"):
        draw_pairs(task_tokenizer(), 2, 0, lambda rng: dict(row))


# ---------------------------------------------------------------------------------------------------------------------
# The page, followed word for word
# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(mamba_ioi.__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "add-a-task.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package to which the page's task is added."""
    folder = tmp_path_factory.mktemp("followed")
    shutil.copytree(ROOT / "mamba_ioi", folder / "mamba_ioi", ignore=shutil.ignore_patterns("__pycache__"))
    (path,) = re.findall(r"^A file of its own, `(\S+)`:\n\n```python\n", PAGE, re.M)
    assert not (folder / path).exists()
    (folder / path).write_text(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)[0], encoding="utf-8")
    return folder


def said_in(folder: Path, *words: str) -> str:
    """What the command line of the copy says; it must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_gives_a_task_in_the_list(followed: Path, capsys) -> None:
    said = said_in(followed, "-m", "mamba_ioi", "tasks")
    (added,) = re.findall(r"^turns  (?:.*\n)(?: .*\n)+", said, re.M)
    assert main(["tasks"]) == 0 and said.replace(added, "") == capsys.readouterr().out
    assert "clean: The store is open: Morgan came in, Tyler came in, Morgan came in, and now -> Tyler\n" in added


@pytest.mark.slow
def test_the_page_gives_an_experiment_on_it(followed: Path, tiny) -> None:
    (words,) = re.findall(r"^```bash\nmamba-ioi (.*)\n```", PAGE, re.M)
    said_in(followed, "-m", "mamba_ioi", *words.split(), "--out", "out")
    result = Result.load(followed / "out")
    assert set(result.table["mark"]) == {"first", "second", "again", "last"}
    assert set(result.table["group"]) == {"First", "The"} and result.meta["pairs"] == 10
    names: dict = {}
    exec((followed / "mamba_ioi" / "tasks" / "turns.py").read_text(encoding="utf-8"), names)
    (row,) = in_texts(names["TASK"](tiny, 1), tiny)
    example = names["TASK"].example
    assert row.texts == (example["clean"], example["corrupt"])
    assert (row.right, row.wrong) == ({example["answer"]}, {example["corrupt_answer"]})


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_the_list_shows_an_example_of_each(capsys) -> None:
    assert main(["tasks"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == NAMES
    assert said.count(" clean: ") == said.count(" corrupt: ") == len(NAMES)
    assert "the year 1770 to the year 17 -> 71, 72, …, 99\n" in said and "-> Gloria\n" in said
    assert "options: pairs=8, queries=1, keys=None, values=None, change='value', divider=None\n" in said


def test_run_on_a_task_is_the_function_on_its_pairs(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "resample_ablation", "--task", "recall", "--pairs", "5", "--seed", "3"]
    assert main(words) == 0
    model = mamba_ioi.load_model("tiny")
    pairs = generate("recall", model.tokenizer, 5, seed=3)
    marks = ["key", "value", "divider", "last"]
    expected = experiments.resample_ablation(model, pairs, marks=marks, progress=False)
    found = Result.load(tmp_path / "results" / "tiny" / "recall" / "resample_ablation")
    pd.testing.assert_frame_equal(found.table, expected.table, atol=1e-6)
    assert (found.meta["task"], found.meta["pairs"], found.meta["seed"]) == ("recall", 5, 3)
    assert main(words) == 0 and "already in" in capsys.readouterr().out
    assert main([*words[:-1], "4"]) == 2 and "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resample_ablation", "--task", "banana"], "there is no task 'banana'; there are agreement"),
        (["resample_ablation", "--task", "recall", "--data", "a.csv"], "not allowed with argument --task"),
        (["resample_ablation", "--marks", "key"], "give --data FILE as well, or --task NAME"),
        (["name_steering", "--task", "recall"], "name_steering takes no pairs of another task; --task is for"),
        (["layer_removal", "--task", "capitals"], "the task capitals: of the countries the tokenizer has 1"),
        (["resample_ablation", "--task", "recall", "--marks", "n1"], "the task recall: the data have no mark 'n1'"),
    ],
)
def test_what_the_command_line_refuses(tmp_path, capsys, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.rglob("*.json"))
