"""Pairs of any task in the experiments: the numbers, columns and figures they give, and what has no meaning there."""

from __future__ import annotations

import pandas as pd
import pytest

from mamba_ioi import IOIDataset, PromptPairs, experiments
from mamba_ioi.models.model import MambaModel, wrap

from . import plain
from .conftest import random_mamba
from .plain import NAMES


@pytest.fixture(scope="module")
def model() -> MambaModel:
    tokenizer = plain.prompt_tokenizer(NAMES)
    return wrap(random_mamba(seed=3, vocab_size=len(tokenizer)), tokenizer, model_id="random")


@pytest.fixture(scope="module")
def ioi(model: MambaModel) -> IOIDataset:
    return IOIDataset.generate(model.tokenizer, 6, seed=5)


def bare(data: PromptPairs, **changes) -> PromptPairs:
    """The same pairs without names, marks or groups."""
    names = ("clean_tokens", "corrupt_tokens", "answers", "corrupt_answers", "last_position", "candidates")
    return PromptPairs(**{name: getattr(data, name) for name in names} | changes)


def test_the_table_has_a_row_for_each_label_of_the_first_group(model, ioi) -> None:
    kind = ["b" if row % 3 else "a" for row in range(len(ioi))]
    pairs = bare(ioi, marks={"first": ioi.marks["n1"]}, groups={"kind": kind, "other": list(range(len(ioi)))})
    table = experiments.resample_ablation(model, pairs, "h", [1], [3, 8, 19], progress=False).table
    assert list(table.columns) == ["kind", "layer", "position", "label", "effect", "low", "high", "n"]
    assert table["kind"].tolist() == ["a"] * 3 + ["b"] * 3, "labels as they first occur"
    assert table["label"].tolist()[:2] == ["first", "went"]
    patched = {p: plain.effects(model._module, ioi, plain.resampled(model._module, ioi, "h", 1, p)) for p in (3, 8, 19)}
    for row in table.itertuples():
        rows = [number for number, label in enumerate(kind) if label == row.kind]
        assert row.n == len(rows) and row.effect == pytest.approx(patched[row.position][rows].mean().item(), abs=2e-3)
    alone = experiments.resample_ablation(model, bare(ioi), "h", [1], [3, 8, 19], progress=False).table
    assert alone["group"].unique().tolist() == ["all"] and alone["n"].unique().tolist() == [len(ioi)]
    assert alone["effect"].tolist() == pytest.approx([value.mean().item() for value in patched.values()], abs=2e-3)


def test_a_position_where_all_rows_differ_says_so(model) -> None:
    """Where the rows have no token in common; a mark's name, or the position's, and an arrow."""
    data = IOIDataset.generate(model.tokenizer, 4, seed=5, corruptions=["CAB AB C -> DAB AB D"])
    for marks, label in (({"first": data.marks["n1"]}, "first A->B"), ({}, "pos3 A->B")):
        table = experiments.resample_ablation(model, bare(data, marks=marks), layers=[1], progress=False).table
        changed = table[table["label"].str.contains("->", regex=False)]
        assert changed["position"].tolist() == [3] and changed["label"].tolist() == [label]
    one = experiments.resample_ablation(model, bare(data[0]), layers=[1], progress=False).table
    names = [model.tokenizer.decode([int(tokens[0, 3])]).strip() for tokens in (data.clean_tokens, data.corrupt_tokens)]
    assert "->".join(names) in one["label"].tolist()


def test_pairs_with_ioi_groups_give_the_tables_of_ioi(model, ioi) -> None:
    """Even the labels of the positions, from the corruption's pattern and the marks n1 … n5."""
    data = ioi[sorted(range(len(ioi)), key=lambda row: (ioi.labels_of("corruption").index(ioi.corruptions[row]), row))]
    pairs = bare(data, marks=dict(data.marks), groups=dict(data.groups))
    for run in (
        lambda rows: experiments.resample_ablation(model, rows, layers=[1], progress=False),
        lambda rows: experiments.conv_slices(model, rows, progress=False),
        lambda rows: experiments.layer_removal(model, rows, progress=False),
        lambda rows: experiments.greedy_layer_removal(model, rows, progress=False),
    ):
        one, other = run(pairs), run(data)
        pd.testing.assert_frame_equal(one.table, other.table)
        assert one.meta["arguments"] == other.meta["arguments"]
    one, other = (experiments.cross_talk(model, rows, 0.6, progress=False).table for rows in (pairs, data))
    key = ["template", "corruption", "step"]
    pd.testing.assert_frame_equal(one.sort_values(key, ignore_index=True), other.sort_values(key, ignore_index=True))
    assert list(one.columns) == list(other.columns)


def test_figures_of_any_pairs(model, ioi) -> None:
    kind = [row % 2 for row in range(len(ioi))]
    for pairs, labels in ((bare(ioi), {"all"}), (bare(ioi, groups={"parity": kind}), {"0", "1"})):
        for run in (
            lambda rows: experiments.resample_ablation(model, rows, layers=[1], progress=False),
            lambda rows: experiments.conv_slices(model, rows, 1, progress=False),
        ):
            figure = run(pairs).plot()
            titles = {axes.get_title().split("\n")[0] for axes in figure.axes if axes.get_title()}
            assert titles == labels
        found = experiments.cross_talk(model, pairs, 0.99, progress=False)
        assert len(found.meta["unreached"]) == len(labels) and all(len(one) == 1 for one in found.meta["unreached"])
        assert f"{len(labels)} without one" in found.plot().get_suptitle()
        reached = experiments.cross_talk(model, pairs, 0, progress=False)
        name = reached.table.columns[0]
        assert name == ("group" if labels == {"all"} else "parity")
        assert reached.table[name].map(str).unique().tolist() == sorted(labels)
        reached.plot()
    experiments.layer_removal(model, bare(ioi), progress=False).plot()


def test_the_bottleneck_of_any_pairs_weighs_labels_alike(model, ioi) -> None:
    label = [0] * (len(ioi) - 2) + [1] * 2
    pairs = bare(ioi, groups={"kind": label})
    typical = {}
    for layer in (1, 2):
        effects = plain.effects(model._module, ioi, plain.resampled(model._module, ioi, "layer_input", layer, None))
        typical[layer] = (effects[:-2].median() + effects[-2:].median()).item()
    assert experiments.bottleneck(model, pairs) == max(typical, key=typical.get)


def test_state_similarity_of_pairs_is_that_of_their_clean_texts(model, ioi) -> None:
    """In the tokens that the pairs have, each different prompt once, at their own bottleneck."""
    pairs = bare(ioi[[0, 0, 1]])
    found = experiments.state_similarity(model, pairs, progress=False)
    assert found.meta["arguments"]["layer"] == experiments.bottleneck(model, pairs)
    texts = [ioi.clean_text[0], ioi.clean_text[1]]
    expected = experiments.state_similarity(model, texts, found.meta["arguments"]["layer"], progress=False)
    columns = ["i", "j", "similarity", "label_i", "label_j"]
    pd.testing.assert_frame_equal(found.table[columns], expected.table[columns])
    assert found.table["prompt"].nunique() == 2


def test_every_experiment_that_needs_no_names_takes_pairs_of_any_task(model, ioi) -> None:
    pairs = bare(ioi, groups={"kind": ["a", "b"] * (len(ioi) // 2)})
    for name in ("resample_ablation_h", "layer_removal", "state_similarity", "edge_matrices"):
        found = experiments.EXPERIMENTS[name](model, pairs, progress=False)
        assert len(found.table) and "seed" not in {key for key, value in found.meta.items() if value is not None}
    marked = experiments.EXPERIMENTS["conv_slices"](model, pairs, marks=["last"], layer=1, progress=False).table
    assert marked["mark"].unique().tolist() == ["last"]
    with pytest.raises(ValueError, match="name_pca speaks of the names in the paper's prompts"):
        experiments.EXPERIMENTS["name_pca"](model, pairs)
    with pytest.raises(ValueError, match="layer_removal has no marks to go by"):
        experiments.EXPERIMENTS["layer_removal"](model, pairs, marks=["last"])
    with pytest.raises(ValueError, match=r"no data that have them, not \['n1'\]"):
        experiments.EXPERIMENTS["conv_slices"](model, marks=["n1"])
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 1"):
        experiments.EXPERIMENTS["conv_slices"](model, pairs=1.5)


def test_what_does_not_fit(model, ioi) -> None:
    pairs = bare(ioi, groups={"layer": [0] * len(ioi)})
    with pytest.raises(ValueError, match="the group 'layer' of the data has the name of a column"):
        experiments.resample_ablation(model, pairs, layers=[1], positions=[3], progress=False)
    with pytest.raises(ValueError, match="the data are PromptPairs, not Tensor"):
        experiments.layer_removal(model, ioi.clean_tokens, progress=False)
    uneven = bare(IOIDataset.generate(model.tokenizer, 6, seed=2, templates="all"))
    with pytest.raises(ValueError, match=r"marks and last token stand at the same positions.*marks=\[\.\.\.\]"):
        experiments.conv_slices(model, uneven, 1, progress=False)
    assert len(experiments.layer_removal(model, uneven, progress=False).table) == model.n_layers + 1


# ---------------------------------------------------------------------------------------------------------------------
# Marks
# ---------------------------------------------------------------------------------------------------------------------


def test_marks_put_all_templates_into_one_map(model) -> None:
    """Each cell against each row's own patch by hooks; a row without the mark is in no mean."""
    data = IOIDataset.generate(model.tokenizer, 10, seed=2, templates="all")
    assert len(data.marks["n1"].unique()) > 1
    some = data.last_position - 1
    some[::3] = -1
    pairs = bare(
        data, marks={"n1": data.marks["n1"], "some": some, "none": some * 0 - 1}, groups={"c": data.corruptions}
    )
    marks = ["n1", "last", "some", "n1+1", "none"]
    for site in ("layer_input", "h"):
        found = experiments.resample_ablation(model, pairs, site, [1], marks=marks, progress=False)
        table = found.table
        assert list(table.columns) == ["c", "layer", "mark", "effect", "low", "high", "n"]
        assert table["mark"].tolist()[:5] == marks and found.meta["arguments"]["marks"] == marks
        for row in table.itertuples():
            kept = [i for i, c in enumerate(data.corruptions) if c == row.c and pairs.positions_of(row.mark)[i] >= 0]
            assert row.n == len(kept)
            if not kept:
                assert row.mark == "none" and row.effect != row.effect
                continue
            by_hand = []
            for i in kept:
                at = int(pairs.positions_of(row.mark)[i])
                one = data[i]
                by_hand.append(
                    plain.effects(model._module, one, plain.resampled(model._module, one, site, 1, at)).item()
                )
            assert row.effect == pytest.approx(sum(by_hand) / len(by_hand), abs=2e-3, rel=2e-3)
            assert row.low <= row.effect <= row.high
    assert table["effect"].abs().max() > 0.01
    figure = found.plot()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == marks
    assert "by layer and mark" in figure.get_suptitle()


def test_conv_slices_by_marks(model, ioi) -> None:
    by_mark = experiments.conv_slices(model, ioi, 1, [-1, 0], marks=["n4+1", "last"], progress=False)
    positions = [int(ioi.marks["n4"][0]) + 1, int(ioi.last_position[0])]
    by_position = experiments.conv_slices(model, ioi, 1, [-1, 0], positions, progress=False)
    assert by_mark.table["effect"].tolist() == pytest.approx(by_position.table["effect"].tolist(), abs=1e-5)
    assert list(by_mark.table.columns) == ["corruption", "slice", "mark", "effect", "low", "high", "n"]
    assert [text.get_text() for text in by_mark.plot().axes[-2].get_xticklabels()] == ["n4+1", "last"]


def test_estimates_by_marks(model, ioi) -> None:
    run = experiments.resample_ablation
    place = [int(ioi.marks["n4"][0]), int(ioi.last_position[0])]
    one = run(model, ioi, "ssm_input", marks=["n4", "last"], estimate="attribution", progress=False)
    other = run(model, ioi, "ssm_input", positions=place, estimate="attribution", progress=False)
    assert one.table["effect"].tolist() == pytest.approx(other.table["effect"].tolist(), abs=1e-5)
    assert one.meta["rank_correlation"] == pytest.approx(other.meta["rank_correlation"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"marks": ["n6"]}, "the data have no mark 'n6'; they have 'last', 'n1', 'n2'"),
        ({"marks": ["last+1"]}, r"row 0 of mark 'last\+1': 20 is no position"),
        ({"marks": []}, "at least one, each once"),
        ({"marks": ["n1", "n1"]}, "at least one, each once"),
        ({"marks": 3}, "not 3"),
        ({"marks": ["n1"], "positions": [3]}, "give one of the two"),
    ],
)
def test_marks_that_do_not_fit(model, ioi, arguments, message: str) -> None:
    for run in (experiments.resample_ablation, lambda *given, **also: experiments.conv_slices(*given, 1, **also)):
        with pytest.raises(ValueError, match=message):
            run(model, ioi, **arguments, progress=False)
