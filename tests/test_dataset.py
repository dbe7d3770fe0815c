"""The IOI prompts: their tokens, names, corruptions, draws, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from mamba_ioi.tasks.ioi import (
    ALIGNED_TEMPLATES,
    BOS,
    CORRUPTIONS,
    NAMES,
    OBJECTS,
    PLACES,
    TEMPLATES,
    IOIDataset,
    single_token_names,
)

ALIGNED_WORDS = r"After|wards|F(?=riends)|riends| ?\w+|[.,]"
PLAIN_WORDS = r" ?\w+|[.,]"


def word_tokenizer(
    names: list[str], pattern: str = ALIGNED_WORDS, bos: str | None = BOS, **special: str
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows these names; `pattern` says what a token is."""
    text = " ".join(TEMPLATES).replace("[NAME]", "").replace("[PLACE]", "").replace("[OBJECT]", "")
    words = re.findall(pattern, text) + [f" {word}" for word in (*PLACES, *OBJECTS, *names)]
    words += [bos] * (bos is not None) + ["[UNK]", *special.values()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def neox(shared: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(shared / "data" / "20B_tokenizer.json"))


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer(["Aaron", "Bella", "Carl", "Diana", "Edgar", "Felix"])


def assert_equal(one: IOIDataset, other: IOIDataset) -> None:
    for field, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, field)), field
        else:
            assert value == getattr(other, field), field


def read(text: str, template: str) -> tuple[list[str], str, str]:
    """Names, place and object of a prompt, read back from its text."""
    pattern = re.escape(template)
    for slot in ("[NAME]", "[PLACE]", "[OBJECT]"):
        pattern = pattern.replace(re.escape(slot), r"(\w+)")
    match = re.fullmatch(pattern, text)
    assert match, text
    n1, n2, n3, place, n4, n5, thing = match.groups()
    return [n1, n2, n3, n4, n5], place, thing


def letters_of(names: list[str], answer: str, known: dict[str, str]) -> str:
    """A prompt's names in the letters of a corruption, e.g. "ABC AB C"; a new name takes the letter D."""
    word = "".join(known.get(name, "D") for name in [*names, answer])
    return f"{word[:3]} {word[3:5]} {word[5]}"


def test_the_word_lists() -> None:
    assert len(TEMPLATES) == 4 and len(CORRUPTIONS) == 5 and len(PLACES) == len(OBJECTS) == 8
    assert (TEMPLATES[0], TEMPLATES[1], TEMPLATES[3]) == ALIGNED_TEMPLATES
    assert len(NAMES) >= 300 and len(set(NAMES)) == len(NAMES)
    assert all(re.fullmatch(r"[A-Z][a-z]+", name) for name in NAMES)


def test_corruptions_replace_one_name_and_change_the_answer() -> None:
    for corruption in CORRUPTIONS:
        clean, corrupt = (side.replace(" ", "") for side in corruption.split(" -> "))
        swaps = {(a, b) for a, b in zip(clean[:5], corrupt[:5], strict=True) if a != b}
        assert len(swaps) == 1 and clean[5] != corrupt[5]
        for side in (clean, corrupt):
            assert {side[3], side[4], side[5]} == set(side[:3]) and len(set(side[:3])) == 3


def test_names_under_neox(neox: PreTrainedTokenizerFast) -> None:
    names = single_token_names(neox)
    assert len(names) >= 150 and len(set(names)) == len(names)
    assert {"Lauren", "Isaac", "Lucas", "Wesley", "Mary"} <= set(names)
    for name in names:
        assert name in NAMES
        assert len(neox(" " + name)["input_ids"]) == 1
        assert not any(other != name and other.startswith(name) for other in names)


def test_positions_under_neox(neox: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(neox, 40)
    assert data.clean_tokens.shape == data.corrupt_tokens.shape == (80, 20)
    assert (data.name_positions == torch.tensor([3, 5, 7, 13, 15])).all()
    assert (data.last_position == 19).all() and (data.clean_tokens[:, 0] == 0).all()
    assert set(data.templates) == set(ALIGNED_TEMPLATES)
    assert data.position_labels == (
        [
            "pos0",
            "pos1",
            "pos2",
            "n1",
            "pos4",
            "n2",
            "pos6",
            "n3",
            "pos8",
            "pos9",
            "pos10",
            "pos11",
            "pos12",
            "n4",
            "pos14",
            "n5",
            "pos16",
            "pos17",
            "pos18",
            "out",
        ]
    )


def test_all_templates_are_padded_on_the_right_under_neox(neox: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(neox, 60, templates="all")
    assert data.position_labels is None and data.clean_tokens.shape[1] == 20
    third = data.select(template=TEMPLATES[2])
    assert 0 < len(third) < len(data)
    assert (third.last_position == 18).all() and (third.clean_tokens[:, 19] == 0).all()
    assert (third.name_positions == torch.tensor([2, 4, 6, 12, 14])).all()
    assert third.position_labels[-2:] == ["out", "pad19"]
    alone = IOIDataset.generate(neox, 4, templates=[TEMPLATES[2]])
    assert alone.clean_tokens.shape[1] == 19 and alone.position_labels[-1] == "out"
    assert alone.position_labels[2] == "n1" and alone.position_labels.count("n5") == 1


@pytest.mark.parametrize("templates", ["aligned", "all"])
def test_tokens_are_those_of_the_text_under_neox(neox: PreTrainedTokenizerFast, templates: str) -> None:
    data = IOIDataset.generate(neox, 60, templates=templates)
    for tokens, texts in ((data.clean_tokens, data.clean_text), (data.corrupt_tokens, data.corrupt_text)):
        for row, text, last in zip(tokens, texts, data.last_position.tolist(), strict=True):
            assert row[: last + 1].tolist() == neox(BOS + text)["input_ids"]
            assert neox.decode(row[1 : last + 1]) == text


def test_every_pair_is_what_its_corruption_says(neox: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(neox, 200, templates="all", symmetric=False)
    assert set(data.corruptions) == set(CORRUPTIONS) and set(data.templates) == set(TEMPLATES)
    for i in range(len(data)):
        names, place, thing = read(data.clean_text[i], data.templates[i])
        other, other_place, other_thing = read(data.corrupt_text[i], data.templates[i])
        answer, corrupt_answer = (neox.decode(ids[i]).strip() for ids in (data.answers, data.corrupt_answers))
        assert (place, thing) == (other_place, other_thing) and place in PLACES and thing in OBJECTS
        clean, corrupt = data.corruptions[i].split(" -> ")
        known = dict(zip(names[:3], clean[:3], strict=True))
        assert len(known) == 3 and answer != corrupt_answer
        assert letters_of(names, answer, known) == clean
        assert letters_of(other, corrupt_answer, known) == corrupt
        assert [neox.decode(token).strip() for token in data.clean_names[i]] == names
        assert [neox.decode(token).strip() for token in data.corrupt_names[i]] == other
        candidates = [neox.decode(token).strip() for token in data.candidates[i] if token >= 0]
        assert len(candidates) == len(set(candidates)) == (4 if "D" in corrupt else 3)
        assert set(candidates) == {*names, *other} and {answer, corrupt_answer} <= set(candidates)
        assert (data.candidates[i] >= 0).int().diff().le(0).all(), "padding stands at the end"


def test_swapped_rows_follow_their_pairs(words: PreTrainedTokenizerFast) -> None:
    plain = IOIDataset.generate(words, 30, templates="all", symmetric=False)
    both = IOIDataset.generate(words, 30, templates="all", symmetric=True)
    assert len(plain) == 30 and len(both) == 60
    assert_equal(both[:30], plain)
    swapped = both[30:]
    for one, other in (("clean_tokens", "corrupt_tokens"), ("answers", "corrupt_answers")):
        assert torch.equal(getattr(swapped, one), getattr(plain, other))
        assert torch.equal(getattr(swapped, other), getattr(plain, one))
    assert swapped.clean_text == plain.corrupt_text and swapped.corrupt_text == plain.clean_text
    assert swapped.templates == plain.templates and swapped.corruptions == plain.corruptions
    for field in ("candidates", "name_positions", "last_position"):
        assert torch.equal(getattr(swapped, field), getattr(plain, field))
    for corruption in set(both.corruptions):
        assert len(both.select(corruption=corruption)) == 2 * len(plain.select(corruption=corruption))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("neox", "4b85843d7c837ac8620b17513dde7908870e9884ff99d2fe9ab79c428e50a04e"),
        ("words", "538983393bfac87d77ba28f4680f26c838cc9fb24401622fae3dc7307be45ae9"),
    ],
)
def test_the_same_arguments_give_the_same_data(request: pytest.FixtureRequest, name: str, digest: str) -> None:
    tokenizer = request.getfixturevalue(name)
    before = torch.get_rng_state()
    data = IOIDataset.generate(tokenizer, 20, templates="all")
    assert torch.equal(before, torch.get_rng_state())
    assert_equal(data, IOIDataset.generate(tokenizer, 20, templates="all", seed=27))
    content = json.dumps([data.clean_text, data.corrupt_text, data.clean_tokens.tolist(), data.answers.tolist()])
    assert hashlib.sha256(content.encode()).hexdigest() == digest
    assert data.clean_text != IOIDataset.generate(tokenizer, 20, templates="all", seed=28).clean_text
    longer = IOIDataset.generate(tokenizer, 50, templates="all", symmetric=False)
    assert_equal(longer[:20], data[:20])


def test_draws_are_uniform(neox: PreTrainedTokenizerFast) -> None:
    n = 4000
    data = IOIDataset.generate(neox, n, templates="all", symmetric=False)
    read_back = [read(text, template) for text, template in zip(data.clean_text, data.templates, strict=True)]
    for drawn, options in (
        (data.templates, TEMPLATES),
        (data.corruptions, CORRUPTIONS),
        ([place for _, place, _ in read_back], PLACES),
        ([thing for _, _, thing in read_back], OBJECTS),
        ([names[0] for names, _, _ in read_back], single_token_names(neox)),
    ):
        counts, expected = Counter(drawn), n / len(options)
        chi_square = sum((counts[option] - expected) ** 2 / expected for option in options)
        freedom = len(options) - 1
        assert sum(counts[option] for option in options) == n
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_indexing(words: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(words, 10, templates="all")
    for index, rows in (
        (3, [3]),
        (-1, [19]),
        (torch.tensor(4), [4]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, -7), [19, 12, 5]),
        (slice(4, 4), []),
        ([], []),
        ([5, 0, 5], [5, 0, 5]),
        (torch.tensor([7, -1]), [7, 19]),
        (torch.arange(20) % 9 == 1, [1, 10, 19]),
        ([i == 6 for i in range(20)], [6]),
    ):
        part = data[index]
        assert isinstance(part, IOIDataset) and len(part) == len(rows)
        assert part.clean_text == [data.clean_text[row] for row in rows]
        assert part.corruptions == [data.corruptions[row] for row in rows]
        assert torch.equal(part.clean_tokens, data.clean_tokens[torch.tensor(rows, dtype=torch.long)])
        assert torch.equal(part.answers, data.answers[torch.tensor(rows, dtype=torch.long)])
    assert [row.clean_text[0] for row in data] == data.clean_text
    assert data[[]].position_labels is None
    for index in (20, -21, [0, 20], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(IndexError):
            data[index]


def test_select(words: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(words, 40)
    assert_equal(data.select(), data)
    part = data.select(template=TEMPLATES[1], corruption=CORRUPTIONS[3])
    wanted = [i for i in range(80) if data.templates[i] == TEMPLATES[1] and data.corruptions[i] == CORRUPTIONS[3]]
    assert len(part) > 0 and part.clean_text == [data.clean_text[i] for i in wanted]
    assert len(data.select(template=TEMPLATES[2])) == 0
    with pytest.raises(ValueError, match=r"unknown corruption 'ABC'.*CAB AB C -> DAB AB D"):
        data.select(corruption="ABC")
    with pytest.raises(ValueError, match="unknown template 2"):
        data.select(template=2)


def test_chosen_templates_and_corruptions(words: PreTrainedTokenizerFast) -> None:
    data = IOIDataset.generate(words, 30, templates=[TEMPLATES[2], TEMPLATES[0]], corruptions=[CORRUPTIONS[4]])
    assert set(data.templates) == {TEMPLATES[0], TEMPLATES[2]} and set(data.corruptions) == {CORRUPTIONS[4]}
    assert set(IOIDataset.generate(words, 5, templates=TEMPLATES[0]).templates) == {TEMPLATES[0]}


def test_names_under_a_small_tokenizer() -> None:
    tokenizer = word_tokenizer(["Wesley", "Daniel", "Dan", "Zork", "Amy"])
    assert single_token_names(tokenizer) == ["Amy", "Daniel", "Wesley"]


def test_padding_uses_the_pad_token_then_the_end_token() -> None:
    names = ["Aaron", "Bella", "Carl", "Diana"]
    for special, token in (
        ({"pad_token": "[PAD]", "eos_token": "[EOS]"}, "[PAD]"),
        ({"eos_token": "[EOS]"}, "[EOS]"),
        ({}, BOS),
    ):
        tokenizer = word_tokenizer(names, **special)
        data = IOIDataset.generate(tokenizer, 30, templates="all").select(template=TEMPLATES[2])
        assert len(data) and (data.clean_tokens[:, -1] == tokenizer.get_vocab()[token]).all()


def test_bos_falls_back_to_the_tokenizers_own() -> None:
    names = ["Aaron", "Bella", "Carl", "Diana"]
    tokenizer = word_tokenizer(names, bos=None, bos_token="[BOS]")
    data = IOIDataset.generate(tokenizer, 3)
    assert (data.clean_tokens[:, 0] == tokenizer.bos_token_id).all()
    with pytest.raises(ValueError, match="BOS"):
        IOIDataset.generate(word_tokenizer(names, bos=None), 3)


def test_a_tokenizer_that_does_not_align_is_refused() -> None:
    names = ["Aaron", "Bella", "Carl", "Diana"]
    with pytest.raises(ValueError, match=r"template 1 \('Then, .* is not aligned") as error:
        IOIDataset.generate(word_tokenizer(names, PLAIN_WORDS), 1)
    assert "(3, 5, 7, 13, 15, 19), elsewhere at (2, 4, 6, 12, 14, 18)" in str(error.value)
    two_piece_place = ALIGNED_WORDS.replace("After", " rest(?=aurant)|aurant|After")
    with pytest.raises(ValueError, match=r"template 1 .*'restaurant'"):
        IOIDataset.generate(word_tokenizer(names, two_piece_place), 1)
    data = IOIDataset.generate(word_tokenizer(names, PLAIN_WORDS), 40, templates="all")
    assert data.position_labels is None
    assert set(data.last_position.tolist()) == {18, 19}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_pairs": 0}, "n_pairs must be a whole number of at least 1, not 0"),
        ({"n_pairs": -3}, "n_pairs .* not -3"),
        ({"n_pairs": 2.0}, "n_pairs .* not 2.0"),
        ({"n_pairs": True}, "n_pairs .* not True"),
        ({"n_pairs": "4"}, "n_pairs .* not '4'"),
        ({"seed": -1}, "seed .* not -1"),
        ({"seed": None}, "seed .* not None"),
        ({"templates": "both"}, "unknown template 'both'; allowed: 'aligned', 'all', 'Then, "),
        ({"templates": [TEMPLATES[0], "Hello"]}, "unknown template 'Hello'"),
        ({"templates": []}, "the list of templates is empty"),
        ({"templates": 3}, "unknown template 3"),
        (
            {"corruptions": "ABC AB C"},
            "unknown corruption 'ABC AB C'; allowed: 'all', 'CAB AB C -> DAB AB D'",
        ),
        ({"corruptions": [None]}, "unknown corruption None"),
        ({"corruptions": "aligned"}, "unknown corruption 'aligned'"),
    ],
)
def test_bad_arguments(words: PreTrainedTokenizerFast, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IOIDataset.generate(words, **{"n_pairs": 4, **arguments})


def test_too_few_names() -> None:
    with pytest.raises(ValueError, match="3 names as single tokens; at least 4"):
        IOIDataset.generate(word_tokenizer(["Aaron", "Bella", "Carl"]), 2)
