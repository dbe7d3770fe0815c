"""Resample ablation, conv slices, bottleneck, cross-talk and state similarity against plain twins on a random Mamba."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from mamba_ioi.experiments import (
    balanced_pairs,
    bottleneck,
    conv_slices,
    cross_talk,
    example_prompts,
    resample_ablation,
    state_similarity,
)
from mamba_ioi.experiments.labels import token_labels
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.result import bootstrap_interval
from mamba_ioi.tasks.ioi import CORRUPTIONS, TEMPLATES, IOIDataset

from . import plain
from .conftest import RANDOM
from .plain import NAMES


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    tokenizer = plain.prompt_tokenizer(NAMES)
    return wrap(RANDOM[request.param](seed=3, vocab_size=len(tokenizer)), tokenizer, model_id="random")


@pytest.fixture(scope="module")
def data(model: MambaModel) -> IOIDataset:
    return IOIDataset.generate(model.tokenizer, 8, seed=5)


def cell(table: pd.DataFrame, **where) -> pd.Series:
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def of_corruption(data: IOIDataset, corruption: str) -> list[int]:
    return [row for row, other in enumerate(data.corruptions) if other == corruption]


@pytest.mark.parametrize("site", ["layer_input", "in_proj", "ssm_input", "h", "out_proj"])
def test_resample_ablation_equals_hooks(model: MambaModel, data: IOIDataset, site: str) -> None:
    cells = [(0, 3), (1, 8), (2, 15), (2, 19)]
    table = resample_ablation(model, data, site, layers=[0, 1, 2], positions=[0, 1, 3, 8, 15, 19], progress=False).table
    corruptions = [corruption for corruption in CORRUPTIONS if corruption in data.corruptions]
    assert list(table["corruption"].unique()) == corruptions and len(table) == len(corruptions) * 3 * 6
    for layer, position in cells:
        expected = plain.effects(model._module, data, plain.resampled(model._module, data, site, layer, position))
        for corruption in corruptions:
            rows = of_corruption(data, corruption)
            found = cell(table, corruption=corruption, layer=layer, position=position)
            assert found["effect"] == pytest.approx(expected[rows].mean().item(), abs=2e-3)
            assert found["n"] == len(rows)
            low, high = bootstrap_interval(expected[rows].double().numpy())
            assert found[["low", "high"]].tolist() == pytest.approx([float(low), float(high)], abs=2e-3)
    before_names = table[table["position"] < 3]["effect"]
    assert before_names.abs().max() < 1e-3, "both prompts are the same there: a run patched with its own values"


def test_some_effects_are_large(model: MambaModel, data: IOIDataset) -> None:
    table = resample_ablation(model, data, layers=[0], positions=[3, 5, 7, 13, 15], progress=False).table
    assert table["effect"].abs().max() > 0.1, "the comparison above would hold for effects of zero"


def test_conv_slices_equal_the_sum_by_hand(model: MambaModel, data: IOIDataset) -> None:
    table = conv_slices(model, data, layer=1, positions=[1, 3, 4, 5, 6, 9, 16], progress=False).table
    assert sorted(table["slice"].unique()) == [-3, -2, -1, 0]
    for tap, position in [(-3, 6), (-2, 5), (-1, 4), (-1, 16), (0, 3)]:
        patched = plain.resampled(model._module, data, "conv_slice", 1, position, tap - 1)
        expected = plain.effects(model._module, data, patched)
        for corruption in table["corruption"].unique():
            found = cell(table, corruption=corruption, slice=tap, position=position)
            assert found["effect"] == pytest.approx(expected[of_corruption(data, corruption)].mean().item(), abs=2e-3)
    assert table[table["position"] == 1]["effect"].abs().max() < 1e-3
    assert table["effect"].abs().max() > 0.05
    assert not {"low", "high", "n", "label"} - set(table)


def test_the_bottleneck_is_the_layer_with_the_largest_effect(model: MambaModel) -> None:
    data = IOIDataset.generate(model.tokenizer, 12, seed=2, templates="all")
    typical = {}
    for layer in (1, 2):
        effects = plain.effects(model._module, data, plain.resampled(model._module, data, "layer_input", layer, None))
        medians = [effects[of_corruption(data, c)].median().item() for c in sorted(set(data.corruptions))]
        typical[layer] = sum(medians) / len(medians)
    assert bottleneck(model, data) == max(typical, key=typical.get)
    assert conv_slices(model, data[:1], positions=[4], slices=[0], progress=False).meta["arguments"]["layer"] in (1, 2)


def cross_talk_by_hand(model: MambaModel, data: IOIDataset, target: float) -> list[tuple[int, float]]:
    module = model._module
    corrupt = {i: plain.values(module, data.corrupt_tokens, "in_proj", i) for i in range(model.n_layers)}

    def judge(resampled: list[int]) -> tuple[float, float]:
        edits = {("in_proj", i): (lambda value, i=i: corrupt[i]) for i in resampled}
        with plain.edited(module, edits), torch.no_grad():
            logits = module(data.clean_tokens, use_cache=False).logits
        return plain.scores(logits[torch.arange(len(data)), data.last_position], data)

    left = list(range(model.n_layers))
    steps = [(-1, judge(left)[0])]
    while steps[-1][1] <= target and left:
        tried = {layer: judge([other for other in left if other != layer]) for layer in left}
        best = max(left, key=lambda layer: (tried[layer][0], round(tried[layer][1], 6), -layer))
        left.remove(best)
        steps.append((best, tried[best][0]))
    return steps


@pytest.mark.parametrize("target", [0.2, 0.95])
def test_cross_talk_equals_hooks(model: MambaModel, target: float) -> None:
    data = balanced_pairs(
        model.tokenizer, 6, seed=4, templates=TEMPLATES[1:3], corruptions=(CORRUPTIONS[0], CORRUPTIONS[4])
    )
    assert len(data) == 2 * 2 * 2 * 6
    result = cross_talk(model, data, target=target, progress=False)
    unreached = []
    for (template, corruption), steps in result.table.groupby(["template", "corruption"]):
        rows = data.select(template=template, corruption=corruption)
        expected = cross_talk_by_hand(model, rows, target)
        assert list(zip(steps["layer"], steps["accuracy"].round(9), strict=True)) == [
            (layer, round(accuracy, 9)) for layer, accuracy in expected
        ]
        assert steps["step"].tolist() == list(range(len(steps))) and set(steps["n"]) == {len(rows)}
        if expected[-1][1] <= target:
            unreached.append([template, corruption])
    assert len(result.table.groupby(["template", "corruption"])) == 4
    assert sorted(result.meta["unreached"]) == sorted(unreached)


def test_cross_talk_with_the_clean_prompts_as_source_changes_nothing(model: MambaModel) -> None:
    data = IOIDataset.generate(model.tokenizer, 20, seed=6, templates=[TEMPLATES[0]], corruptions=[CORRUPTIONS[2]])
    same = replace(data, corrupt_tokens=data.clean_tokens)
    clean = plain.scores(plain.last_logits(model._module, data.clean_tokens, data.last_position), data)
    table = cross_talk(model, same, target=0.0, progress=False).table
    assert table.iloc[0]["accuracy"] == pytest.approx(clean[0]) and len(table) == 1
    assert table.iloc[0]["probability"] == pytest.approx(clean[1], abs=1e-5)


def test_balanced_pairs_are_the_first_of_each_kind_in_both_directions(model: MambaModel) -> None:
    data = balanced_pairs(model.tokenizer, 3, seed=1)
    kinds = list(zip(data.templates, data.corruptions, strict=True))
    assert len(data) == 4 * 5 * 3 * 2 and all(kinds.count(kind) == 6 for kind in set(kinds)) and len(set(kinds)) == 20
    half = len(data) // 2
    assert torch.equal(data.clean_tokens[:half], data.corrupt_tokens[half:])
    assert data.clean_text[:half] == data.corrupt_text[half:]
    fewer = balanced_pairs(model.tokenizer, 2, seed=1)
    kind = kinds[0]
    texts = data.select(*kind).clean_text[:2]
    assert fewer.select(*kind).clean_text[:2] == texts


def test_state_similarity_equals_the_recurrence(model: MambaModel) -> None:
    text = "Friends Aaron, Bella and Oscar went to the store. Aaron and Bella gave a drink to"
    result = state_similarity(model, [text, "When Carl"], layer=1, progress=False)
    table = result.table[result.table["prompt"] == text]
    ids = model.tokenizer("<|endoftext|>" + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    assert length == 20 and ids[0, 0] == model.tokenizer.bos_token_id and len(table) == length**2
    acts = plain.forward_by_hand(model._module, ids)
    written, states = (acts[f"blocks.1.hook_{site}"][0].flatten(1).detach() for site in ("write", "h"))
    for i, j in [(0, 0), (3, 3), (3, 10), (7, 19), (15, 2), (19, 19)]:
        expected = torch.nn.functional.cosine_similarity(written[i], states[j], dim=0)
        found = cell(table, i=i, j=j)
        assert found["similarity"] == pytest.approx(expected.item(), abs=1e-4)
        assert [found["label_i"], found["label_j"]] == [model.tokenizer.decode([ids[0, k]]) for k in (i, j)]
    assert cell(table, i=0, j=0)["similarity"] == pytest.approx(1), "the first state is the first contribution"
    assert (result.table["prompt"] == "When Carl").sum() == 9


def test_example_prompts_are_known_to_the_tokenizer(model: MambaModel) -> None:
    prompts = example_prompts(model.tokenizer)
    assert len(prompts) >= 2
    for text in prompts:
        assert model.tokenizer.unk_token_id not in model.tokenizer(text)["input_ids"]


def test_labels(model: MambaModel) -> None:
    data = IOIDataset.generate(model.tokenizer, 12, seed=1, corruptions=[CORRUPTIONS[0]])
    labels = token_labels(data, model.tokenizer, CORRUPTIONS[0])
    assert labels[:8] == ["BOS", "pos1", "pos2", "n1 C->D", ",", "n2 A", "and", "n3 B"]
    assert labels[11:] == ["pos11", ".", "n4 A", "and", "n5 B", "gave", "a", "pos18", "to"]
    assert token_labels(data, None, CORRUPTIONS[0])[:4] == ["pos0", "pos1", "pos2", "n1 C->D"]
    one = data[:1]
    clean, corrupt = (model.tokenizer.decode(names[0]).split()[0] for names in (one.clean_names, one.corrupt_names))
    assert token_labels(one, model.tokenizer, CORRUPTIONS[0])[3] == f"{clean}->{corrupt}"
    pair = IOIDataset.generate(model.tokenizer, 1, seed=1, corruptions=[CORRUPTIONS[0]])
    both = token_labels(pair, model.tokenizer, CORRUPTIONS[0])
    assert both[3:8:2] == ["n1 C->D", "n2 A", "n3 B"] and both[11] == pair.clean_text[0].split(".")[0].split()[-1]
    padded = IOIDataset.generate(model.tokenizer, 30, seed=1, templates="all", corruptions=[CORRUPTIONS[0]])
    assert token_labels(padded.select(TEMPLATES[2]), model.tokenizer, CORRUPTIONS[0])[-2:] == ["to", "pad19"]
    last = IOIDataset.generate(model.tokenizer, 12, seed=1, corruptions=[CORRUPTIONS[3]])
    assert token_labels(last, model.tokenizer, CORRUPTIONS[3])[15] == "n5 B->C"


def test_bad_arguments(model: MambaModel, data: IOIDataset) -> None:
    everything = IOIDataset.generate(model.tokenizer, 20, templates="all")
    one_layer = wrap(RANDOM["mamba"](vocab_size=len(model.tokenizer), num_hidden_layers=1), None, model_id="one")
    for call, message in (
        (lambda: resample_ablation(model, data[:0]), "no rows"),
        (lambda: resample_ablation(model, everything), "templates='aligned'"),
        (lambda: resample_ablation(model, data, "A"), "site 'A'"),
        (lambda: resample_ablation(model, data, "embed"), "site 'embed'"),
        (lambda: resample_ablation(model, data, "nothing"), "site 'nothing'"),
        (lambda: resample_ablation(model, data, {}), r"site \{\}"),
        (lambda: resample_ablation(model, data, layers=[3]), "layers are whole numbers from 0 to 2"),
        (lambda: resample_ablation(model, data, layers=[]), "layers are whole numbers"),
        (lambda: resample_ablation(model, data, layers=[1, 1]), "each layer is named once"),
        (lambda: resample_ablation(model, data, layers=torch.zeros(2, 0)), "layers are whole numbers"),
        (lambda: resample_ablation(model, data, positions=[-1]), "positions are whole numbers from 0 to 19"),
        (lambda: conv_slices(model, everything), "templates='aligned'"),
        (lambda: conv_slices(model, data, 1, slices=(1,)), r"slices are among \[-3, -2, -1, 0\]"),
        (lambda: conv_slices(model, data, 1.5), "1.5"),
        (lambda: cross_talk(model, data, target=1.0), "target"),
        (lambda: cross_talk(model, data[:0]), "no rows"),
        (lambda: bottleneck(one_layer, data), "other than layer 0"),
        (lambda: bottleneck(model, data[:0]), "no rows"),
        (lambda: state_similarity(model, [], 1), "prompts are"),
        (lambda: state_similarity(model, ["a", "a"], 1), "prompts are"),
        (lambda: state_similarity(model, "a", 3), "layers are whole numbers from 0 to 2"),
        (lambda: state_similarity(one_layer, "a", 0), "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
