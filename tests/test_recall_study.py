"""The recall study: its measures against plain Hugging Face, its report's rules, its subjects and their training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from mamba_ioi import load_model, planted_recall
from mamba_ioi.catalogue import RECALL as STUDY
from mamba_ioi.cli import main
from mamba_ioi.experiments import recall
from mamba_ioi.report import recall as rules
from mamba_ioi.report import write_report
from mamba_ioi.report.evidence import Setting
from mamba_ioi.result import Result
from mamba_ioi.tasks import generate
from mamba_ioi.zoo import EMBEDDED, RECALL
from mamba_ioi.zoo.word_tokenizer import build_tokenizer

SUBJECTS = ("mamba", "mamba-noconv", "mamba2", "attention")


# --- against plain Hugging Face ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["mamba", "attention"])
def test_interchange_is_a_hook_s_doing(subject: str) -> None:
    """By hand: transformers' own forward of the changed prompt, a hook that puts the original's block output back."""
    model, rows = load_model(RECALL[subject]), 16
    found = recall.recall_interchange({subject: model}, pairs=rows, seed=3, progress=False).table
    module = AutoModelForCausalLM.from_pretrained(EMBEDDED[RECALL[subject]]).eval()
    body = module.backbone if subject == "mamba" else module.model
    for change, layer in itertools.product(("key", "value"), (0, 1)):
        data = generate("recall", model.tokenizer, rows, seed=3, pairs=6, change=change)
        held: list[torch.Tensor] = []

        def probability(tokens: torch.Tensor, data=data) -> torch.Tensor:
            with torch.no_grad():
                logits = module(tokens, use_cache=False).logits[:, -1]
            return logits.double().softmax(1).gather(1, data.answers[:, None])[:, 0]

        handle = body.layers[layer].register_forward_hook(lambda _, given, out, held=held: held.append(first(out)))
        original = probability(data.clean_tokens)
        handle.remove()
        changed = probability(data.corrupt_tokens)
        cells = found.query("change == @change and layer == @layer and component == 'block out'").set_index("place")
        for place, positions in (("key", data.marks["key"]), ("query", data.last_position)):

            def put(_, given, out, positions=positions, held=held):
                stream = first(out).clone()
                every = torch.arange(rows)
                stream[every, positions] = held[0][every, positions]
                return stream if isinstance(out, torch.Tensor) else (stream, *out[1:])

            handle = body.layers[layer].register_forward_hook(put)
            restored = (probability(data.corrupt_tokens) - changed).mean() / (original - changed).mean()
            handle.remove()
            assert cells.loc[place, "restored"] == pytest.approx(float(restored), abs=1e-4)
        assert cells.loc["key", "original"] == pytest.approx(float(original.mean()), abs=1e-5)
        assert cells.loc["key", "changed"] == pytest.approx(float(changed.mean()), abs=1e-5)
        assert (cells["low"] <= cells["restored"]).all() and (cells["restored"] <= cells["high"]).all()


def first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_accuracies_are_counts_of_right_answers() -> None:
    model = load_model(RECALL["mamba"])
    by_pairs = recall.recall_accuracy({"mamba": model}, pairs=40, seed=5).table.set_index("pairs")
    assert list(by_pairs.index) == list(range(1, recall.MOST_PAIRS + 1))
    for pairs in (2, 6):
        data = generate("recall", model.tokenizer, 40, seed=5, pairs=pairs)
        with torch.no_grad():
            right = model._module(data.clean_tokens).logits[:, -1].argmax(1) == data.answers
        assert by_pairs.loc[pairs, "accuracy"] == pytest.approx(right.double().mean().item())
    far = recall.recall_distance({"mamba": model}, pairs=40, seed=5).table  # of the same prompts, 6 pairs each
    assert (far["accuracy"] * far["n"]).sum() == pytest.approx(40 * by_pairs.loc[6, "accuracy"])
    assert set(far["distance"]) == {3, 5, 7, 9, 11, 13}  # from the key to the query: a value, pairs, the divider


def test_attention_is_the_model_s_own() -> None:
    model = load_model(RECALL["attention"])
    found = recall.recall_attention({"attention": model}, pairs=10, seed=4).table
    data = generate("recall", model.tokenizer, 10, seed=4, pairs=6)
    module = AutoModelForCausalLM.from_pretrained(EMBEDDED[RECALL["attention"]], attn_implementation="eager").eval()
    with torch.no_grad():
        weights = module(data.clean_tokens, output_attentions=True).attentions[1].mean(1)[:, -1]
    by_hand = weights.gather(1, data.marks["value"][:, None]).mean()
    share = found.query("layer == 1 and source == 'value'")["share"].item()
    assert share == pytest.approx(float(by_hand), abs=1e-5)


def test_attribution_of_attention_is_autograd_s() -> None:
    """By hand: transformers' own forward of the changed prompt, its block outputs' gradients, the original's values."""
    model, rows = load_model(RECALL["attention"]), 12
    found = recall.recall_attribution({"attention": model}, pairs=rows, seed=6).table
    assert set(found["component"]) == {"block in", "mixer out", "block out"}
    module = AutoModelForCausalLM.from_pretrained(EMBEDDED[RECALL["attention"]]).eval()
    data = generate("recall", model.tokenizer, rows, seed=6, pairs=6, change="key")
    ends, streams = [], []
    for tokens in (data.corrupt_tokens, data.clean_tokens):
        held: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(lambda *given, held=held: keep(given[-1], held))
            for block in module.model.layers
        ]
        logits = module(tokens, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        right, wrong = (logits.gather(1, ids[:, None])[:, 0] for ids in (data.answers, data.corrupt_answers))
        ends.append(right - wrong)
        streams.append(held)
    changed, original = ends
    gradients = torch.autograd.grad(changed.sum(), streams[0])
    whole = (original - changed).mean().item()
    for layer, place in itertools.product((0, 1), ("key", "value")):
        moved = ((streams[1][layer] - streams[0][layer]) * gradients[layer]).sum(-1)
        by_hand = moved.gather(1, data.marks[place][:, None]).mean().item() / whole
        cell = found.query("change == 'key' and component == 'block out' and layer == @layer and place == @place")
        assert cell["estimate"].item() == pytest.approx(by_hand, abs=1e-4)


def keep(output, held: list[torch.Tensor]) -> None:
    first(output).retain_grad()
    held.append(first(output))


def test_where_the_change_takes_nothing_nothing_is_said() -> None:
    model = planted_recall(n_keys=9)
    with torch.no_grad():
        model._module.lm_head.weight.zero_()
    found = recall.recall_interchange({"blind": model}, pairs=3, progress=False).table
    assert found["restored"].isna().all() and (found["original"] - 1 / model.vocab_size).abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [{}, {"one": None}, "mamba"])
def test_refuses_what_are_no_subjects(wrong) -> None:
    with pytest.raises(ValueError, match="subject"):
        recall.recall_accuracy(wrong)


# --- the rules --------------------------------------------------------------------------------------------------------


def accuracies(**values: float) -> Result:
    known = dict.fromkeys(SUBJECTS, 1.0) | {name.replace("_", "-"): value for name, value in values.items()}
    rows = [(name, 6, value, value, value, 200) for name, value in known.items()]
    return Result(pd.DataFrame(rows, columns=list(STUDY.rows[0].columns)), {"experiment": "recall_accuracy"})


def interchanged(cells: Mapping[tuple[str, int, str, str], float]) -> Result:
    """A table in which a changed key is restored at these cells, and at no other."""
    grid = itertools.product(SUBJECTS, ("key", "value"), (0, 1), recall.COMPONENTS, recall.PLACES)
    rows = [
        (*one, value := cells.get((one[0], *one[2:]), 0.0) if one[1] == "key" else 0.0, value, value, 1.0, 0.1, 99)
        for one in grid
    ]
    columns = list(STUDY.catalogue["recall_interchange"].columns)
    return Result(pd.DataFrame(rows, columns=columns), {"experiment": "recall_interchange"})


def found(rule, **results: Result):
    return rule({f"recall_{name}": result for name, result in results.items()}, Setting())


def test_who_learns_and_who_fails() -> None:
    assert found(rules.learned, accuracy=accuracies(mamba_noconv=0.2)).holds
    assert found(rules.learned, accuracy=accuracies(mamba2=0.9)).holds is False
    fails = found(rules.fails, accuracy=accuracies(mamba_noconv=0.16))
    assert fails.holds and "0.160" in fails.sentence and "0.167" in fails.sentence
    assert found(rules.fails, accuracy=accuracies(mamba_noconv=0.99)).holds is False
    assert found(rules.fails, accuracy=accuracies(mamba=0.5, mamba_noconv=0.1)).holds is None


@pytest.mark.parametrize(
    ("rule", "subject"), [("induction", "mamba"), ("heads", "mamba2"), ("transformer", "attention")]
)
def test_induction_or_direct_retrieval(rule: str, subject: str) -> None:
    decide = getattr(rules, rule)
    direct = {(subject, 0, "block in", "key"): 1.0, (subject, 1, "block out", "query"): 1.0}
    bound = direct | {(subject, 1, "conv", "value+2"): 0.9}
    assert found(decide, accuracy=accuracies(), interchange=interchanged(direct)).holds is False
    induction = found(decide, accuracy=accuracies(), interchange=interchanged(bound))
    assert induction.holds and "conv of layer 1 at value+2" in induction.sentence
    unlearned = accuracies(**{subject: 0.3})
    assert found(decide, accuracy=unlearned, interchange=interchanged(bound)).holds is None


def test_by_the_conv_or_by_the_scan() -> None:
    later = {("mamba", 1, component, "value"): 1.0 for component in ("scan", "mixer out", "block out")}
    assert found(rules.conv, interchange=interchanged(later)).holds is False
    by_conv = found(rules.conv, interchange=interchanged(later | {("mamba", 1, "conv", "value"): 0.8}))
    assert by_conv.holds and "conv of layer 1, at value" in by_conv.sentence
    earlier = later | {("mamba", 0, "scan", "value+1"): 0.8, ("mamba", 1, "conv", "value"): 0.8}
    assert found(rules.conv, interchange=interchanged(earlier)).holds is False
    assert found(rules.conv, interchange=interchanged({})).holds is None


def test_which_edge_carries_the_key() -> None:
    columns = list(STUDY.catalogue["recall_edges"].columns)

    def edges(tap: float, scan: float) -> Result:
        rows = [
            ("mamba", "key", 1, via, "key", "value", *[value] * 6, 9)
            for via, value in (("conv[-1]", tap), ("scan", scan))
        ]
        return Result(pd.DataFrame(rows, columns=columns), {"experiment": "recall_edges"})

    assert found(rules.taps, edges=edges(0.8, 0.1)).holds and not found(rules.taps, edges=edges(0.1, 0.8)).holds


def test_whether_attribution_finds_it() -> None:
    measured = interchanged({("mamba", 1, "conv", "value"): 1.0, ("mamba2", 0, "conv", "value"): 0.7})
    right = measured.table.rename(columns={"restored": "estimate"}).drop(columns=["original", "changed"])
    results = {"accuracy": accuracies(), "interchange": measured}
    same = Result(right, {"experiment": "recall_attribution"})
    assert found(rules.estimated, attribution=same, **results).holds
    faint = Result(right.assign(estimate=right["estimate"] / 100), {"experiment": "recall_attribution"})
    assert found(rules.estimated, attribution=faint, **results).holds is False, "in order, and nothing all the same"
    turned = Result(right.assign(estimate=-right["estimate"]), {"experiment": "recall_attribution"})
    assert found(rules.estimated, attribution=turned, **results).holds is False


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reproduce_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [
        "reproduce",
        "--study",
        "recall",
        "--out",
        str(out),
        "--pairs",
        "4",
        "--only",
        "recall_accuracy,recall_interchange",
    ]
    assert main(words) == 0
    assert "2 of 2 figures are in" in capsys.readouterr().out
    accuracy, interchange = (Result.load(out / "results" / f"recall_{name}") for name in ("accuracy", "interchange"))
    assert set(accuracy.table["subject"]) == set(interchange.table["subject"]) == set(SUBJECTS)
    assert {"subject", "pairs", "accuracy", "n"} <= set(accuracy.table)
    assert {"subject", "change", "layer", "component", "place", "restored", "n"} <= set(interchange.table)
    assert set(interchange.table["component"]) == set(recall.COMPONENTS)
    assert {"key", "value", "divider", "query"} <= set(interchange.table["place"])
    text = (out / "report.md").read_text(encoding="utf-8")
    for title in ("Mamba does induction", "Without the short convolution, Mamba fails", STUDY.title):
        assert title in text
    assert "--study recall" in text and "mamba-370m" not in text and "IOI" not in text
    assert (out / "recall_interchange.png").is_file() and write_report(out) == []
    assert main(words) == 0 and "kept, it was complete" in capsys.readouterr().out
    assert main([*words, "--seed", "3"]) == 2 and "seed=27" in capsys.readouterr().err
    assert main(["reproduce", "--out", str(out), "--only", "fig3"]) == 2 and "model=recall" in capsys.readouterr().err
    assert main(["plot", str(out)]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--study banana", "there is no study 'banana'"),
        ("--study recall --only fig4", "there is no figure 'fig4'"),
        ("--study recall --task recall", "--task has no meaning with --study"),
        ("--study recall --model planted", "--model has no meaning with --study"),
    ],
)
def test_refuses_what_a_study_has_not(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words.split()]) == 2
    assert said in capsys.readouterr().err


# --- the subjects -----------------------------------------------------------------------------------------------------


def test_all_subjects_are_small_and_share_a_tokenizer() -> None:
    folders = [EMBEDDED[name] for name in RECALL.values()]
    assert tuple(RECALL) == SUBJECTS
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) <= 4_000_000
    for folder in folders:
        assert load_model(folder).tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_mamba_learns_the_task() -> None:
    told = json.loads((EMBEDDED["recall-mamba"] / "training.json").read_text(encoding="utf-8"))
    assert told["accuracy"]["6"] >= 0.95
