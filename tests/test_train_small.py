"""Small models that are trained on one task: their prompts, their training, and what the cards of packaged ones say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mamba_ioi import load_model
from mamba_ioi.arguments import TRAINED
from mamba_ioi.cli import main
from mamba_ioi.tasks import generate
from mamba_ioi.zoo import EMBEDDED, RECALL
from mamba_ioi.zoo.lessons import GAPS, LESSONS, SPAN, WORDS
from mamba_ioi.zoo.train_small import LEARNED, SUBJECTS, card, check_family, measure, train

FAMILIES = tuple(SUBJECTS)


def prompts_of(task: str):
    tokenizer = LESSONS[task].tokenizer()
    return tokenizer, LESSONS[task].prompts(tokenizer)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", LESSONS)
def test_prompts_are_those_of_the_task(task: str) -> None:
    """Of the same form, token by token: where all prompts of the task agree, these do too."""
    tokenizer, prompts = prompts_of(task)
    rows = prompts.batch(200, seeded(0))
    assert tokenizer.unk_token_id not in rows
    options = {"recall": {"pairs": 6}, "induction": {"before": 3, "between": 3}}.get(task, {})
    pairs = generate(task, tokenizer, 200, **options)
    drawn = pairs.clean_tokens
    assert rows.shape[1] == drawn.shape[1] + 1 and pairs.last_position.eq(drawn.shape[1] - 1).all()
    alike = (drawn == drawn[0]).all(0)
    assert torch.equal(rows[:, :-1][:, alike], drawn[:1, alike].expand(len(rows), -1))
    for place in (~alike).nonzero().flatten().tolist():
        mine, theirs = (set(some[:, place].tolist()) for some in (rows, drawn))
        assert len(mine & theirs) > min(len(mine), len(theirs)) / 2
    assert rows.tolist() == prompts.batch(200, seeded(0)).tolist() != prompts.batch(200, seeded(1)).tolist()


def test_recall_s_answers_stand_by_the_keys() -> None:
    _, prompts = prompts_of("recall")
    keys, values, asked = set(prompts.keys.tolist()), set(prompts.values.tolist()), set()
    for row in prompts.draw(50, 3, seeded(0)).tolist():
        context, query, answer = row[1:7], *row[8:]
        stands = dict(zip(context[::2], context[1::2], strict=True))
        assert len(stands) == 3 and set(stands) <= keys and set(stands.values()) <= values
        assert stands[query] == answer
        asked.add(context.index(query) // 2)
    assert asked == {0, 1, 2}


def test_induction_s_answers_follow_the_first_time() -> None:
    _, prompts = prompts_of("induction")
    firsts = set()
    for row in prompts.batch(400, seeded(0)).tolist():
        words, again, answer = row[1 : WORDS + 1], *row[WORDS + 1 :]
        assert len(set(words)) == WORDS and words[words.index(again) + 1] == answer
        firsts.add(words.index(again))
    assert firsts == set(range(WORDS - 1)), "no place tells which word comes again"
    for gap, (rows, right) in prompts.tests(20).items():
        first = (rows[:, 1 : WORDS + 1] == rows[:, WORDS + 1 : WORDS + 2]).int().argmax(1)
        assert first.eq(WORDS - 2 - int(gap)).all() and torch.equal(rows[:, -1:], right)
    assert list(prompts.tests(1)) == list(map(str, GAPS))


def test_spans_end_after_they_began_and_some_beginnings_are_held_out() -> None:
    tokenizer, prompts = prompts_of("greater_than")

    def read(row: list[int]) -> tuple[str, str, int, int]:
        text = tokenizer.decode(row, skip_special_tokens=True)
        found = re.fullmatch(r"The (\w+) went on from the year (\d\d)(\d\d) to the year (\d\d)(\d\d)", text)
        assert found and found[2] == found[4], text
        return found[1], found[2], int(found[3]), int(found[5])

    trained = [read(row) for row in prompts.batch(3000, seeded(0)).tolist()]
    spans = {end - year for _, _, year, end in trained}
    assert spans == set(range(1, SPAN + 1)) and {year for _, _, year, _ in trained} == set(range(2, 99))
    seen = {beginning[:3] for beginning in trained}
    for kind, (rows, right) in prompts.tests(300).items():
        least, most = map(int, kind.split(" to "))
        for row, ids in zip(rows.tolist(), right.tolist(), strict=True):
            *beginning, year, end = read(row)
            assert least <= year <= most and (*beginning, year) not in seen
            ends = [int(tokenizer.decode([token])) for token in ids if token >= 0]
            assert ends == list(range(year + 1, min(year + SPAN, 99) + 1)) and end in ends
    assert len(prompts.held_out) / (len(prompts.held_out) + len(prompts.trained)) == pytest.approx(1 / 8, abs=0.01)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "family"),
    [*(("recall", family) for family in FAMILIES), ("induction", "mamba"), ("greater_than", "mamba")],
)
def test_a_few_steps_write_a_model_that_loads_and_the_seed_fixes_it(tmp_path: Path, task: str, family: str) -> None:
    before = torch.random.get_rng_state()
    reports = [
        train(tmp_path / name, task=task, family=family, seed=seed, steps=2, n_test=4, progress=False)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    model = load_model(tmp_path / "a")
    shipped = load_model(RECALL[family])
    assert model.layer_kinds == shipped.layer_kinds and model.tokenizer.get_vocab() == prompts_of(task)[0].get_vocab()
    assert task != "recall" or model.sizes() == shipped.sizes()
    assert json.loads((tmp_path / "a" / "training.json").read_text(encoding="utf-8")) == reports[0]
    told = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert told == card(reports[0]) and "does not learn" in told
    assert f"train --task {task} --family {family} --seed 5`" in told


def test_what_is_right_is_measured_over_the_vocabulary() -> None:
    """A model that always gives the year 42 is right where spans begin up to 20 years before, and not after."""
    tokenizer, prompts = prompts_of("greater_than")
    token = prompts.years[42]

    class Always:
        logits = staticmethod(lambda model, tokens: torch.eye(len(tokenizer))[token].expand(*tokens.shape, -1))

    found = measure(Always, None, prompts, 2000)
    assert found["51 to 75"] == found["76 to 98"] == 0 and found["26 to 50"] == pytest.approx(16 / 25, abs=0.05)
    assert found["02 to 98"] == pytest.approx(20 / 97, abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"family": "gpt2"}, "'gpt2' cannot be trained on recall; the families are mamba,"),
        ({"task": "colors"}, "not trained on the task 'colors', but on recall, induction, greater_than"),
        ({"steps": 0}, "1 or more"),
    ],
)
def test_training_refuses_bad_arguments(tmp_path: Path, wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(tmp_path, **{"steps": 1} | wrong)


def test_the_command_trains_on_every_task_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ("ioi", *LESSONS) == TRAINED
    for task in LESSONS:
        check_family("mamba-noconv", task)
    words = ["train", "--task", "induction", "--family", "mamba-noconv", "--steps", "1", "--out", str(tmp_path / "new")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "words between 3: accuracy 0." in said and (tmp_path / "new" / "config.json").is_file()


# --- the packaged ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subject_is_as_its_card_says(family: str) -> None:
    folder = EMBEDDED[RECALL[family]]
    told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == card(told)
    assert (told["task"], told["subject"], told["seed"]) == ("recall", family, 0)
    assert told["steps"] == LESSONS["recall"].steps[family]
    assert ("does not learn" in card(told)) == (told["accuracy"]["6"] < LEARNED)
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert measure(SUBJECTS[family], module, prompts_of("recall")[1], told["n_test"]) == told["accuracy"]
