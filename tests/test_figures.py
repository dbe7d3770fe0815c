"""Figures: they show the numbers and labels of their tables, legibly, on a scale that readers can trust."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import mamba_ioi
from mamba_ioi import figures
from mamba_ioi.catalogue import STUDIES
from mamba_ioi.circuits import Graph
from mamba_ioi.figures import FIGURES, ModelSizes, residual_edges, save_figure
from mamba_ioi.result import Result

from .circuit_examples import CIRCUIT_EXAMPLES

CORRUPTIONS = [
    "CAB AB C -> DAB AB D",
    "ACB AB C -> ADB AB D",
    "ABC AB C -> ABD AB D",
    "ABC AB C -> ABC AC B",
    "ABC AC B -> ABC BC A",
]
TEXT = "<BOS>| Then|,| Lauren->Wesley|,| Isaac| and| Lucas->Benjamin| went| to| the| hospital|."
TOKENS = [*TEXT.split("|"), " Isaac", " and", " Lucas", " gave", " a", " basketball", " to"]
SIZES = {
    "n_layers": 48,
    "d_model": 1024,
    "d_inner": 2048,
    "d_state": 16,
    "dt_rank": 64,
    "d_conv": 4,
    "vocab_size": 50280,
}
SSD_SIZES = {name: size for name, size in SIZES.items() if name != "dt_rank"} | {
    "d_state": 128,
    "n_heads": 32,
    "head_dim": 64,
    "n_groups": 1,
}


def make(experiment: str, rows: list[tuple], columns: str, n_layers: int = 8, **extra) -> Result:
    arguments = extra.pop("arguments", {})
    model = SimpleNamespace(model_id="tiny" if n_layers < 20 else "state-spaces/mamba-370m-hf", n_layers=n_layers)
    return Result.create(
        experiment, pd.DataFrame(rows, columns=columns.split()), model=model, arguments=arguments, **extra
    )


def resample(n_layers: int = 8, site: str = "layer_input") -> Result:
    random = np.random.default_rng(0)
    rows = [
        (corruption, layer, position, label, effect, effect - 0.1, effect + 0.1, 32)
        for corruption in CORRUPTIONS
        for layer in range(n_layers)
        for position, label in enumerate(TOKENS)
        for effect in [random.uniform(-0.3, 0.9)]
    ]
    columns = "corruption layer position label effect low high n"
    return make("resample_ablation", rows, columns, n_layers, arguments={"site": site})


def removal(n_layers: int = 8) -> Result:
    random = np.random.default_rng(1)
    values = np.array([0.83, *random.uniform(0.1, 0.9, n_layers)])
    rows = [
        (layer, p, p - 0.05, p + 0.04, p + 0.1, p + 0.03, p + 0.12, 64) for layer, p in enumerate(values.tolist(), -1)
    ]
    columns = "layer probability low high accuracy accuracy_low accuracy_high n"
    return make("layer_removal", rows, columns, n_layers)


def greedy(n_layers: int = 8) -> Result:
    order = [-1, *np.random.default_rng(2).permutation(n_layers).tolist()]
    rows = [
        (step, layer, accuracy, accuracy - 0.05, accuracy + 0.04, accuracy / 2, 64)
        for step, (layer, accuracy) in enumerate(zip(order, np.linspace(0.96, 0.2, n_layers + 1).tolist(), strict=True))
    ]
    columns = "step layer accuracy accuracy_low accuracy_high probability n"
    return make("greedy_layer_removal", rows, columns, n_layers, removable=2)


def cross(n_layers: int = 8) -> Result:
    rows = []
    for number, (template, corruption) in enumerate((t, c) for t in "abcd" for c in CORRUPTIONS):
        rows += [(template, corruption, 0, -1, 0.1), (template, corruption, 1, 3, 0.8)]
        if number < 5:
            rows.append((template, corruption, 2, n_layers - 1, 0.95))
    return make("cross_talk", rows, "template corruption step layer accuracy", n_layers)


def similarity(prompts: int = 3) -> Result:
    random = np.random.default_rng(3)
    rows = [
        (f"A prompt, number {prompt}", i, j, random.uniform(-1, 1), TOKENS[i], TOKENS[j])
        for prompt in range(prompts)
        for i in range(len(TOKENS) - prompt)
        for j in range(len(TOKENS) - prompt)
    ]
    return make("state_similarity", rows, "prompt i j similarity label_i label_j", 48, arguments={"layer": 39})


def slices(n_layers: int = 8) -> Result:
    random = np.random.default_rng(4)
    rows = [
        (corruption, tap, position, label, random.uniform(-0.5, 0.8), 32)
        for corruption in CORRUPTIONS
        for tap in (-3, -2, -1, 0)
        for position, label in enumerate(TOKENS)
    ]
    return make("conv_slices", rows, "corruption slice position label effect n", n_layers, arguments={"layer": 4})


def steering() -> Result:
    random = np.random.default_rng(5)
    rows = [
        (method, source, target, random.uniform(0, 1), 101)
        for method in ("subtract_add", "replace")
        for source in range(1, 6)
        for target in range(1, 6)
    ]
    return make("name_steering", rows, "method source_slot target_slot success n", 48, arguments={"layer": 39})


def pca() -> Result:
    random = np.random.default_rng(6)
    rows = [(f" Name{name}", slot, *random.normal(size=2)) for name in range(100, 140) for slot in range(1, 6)]
    return make("name_pca", rows, "name slot pc1 pc2", explained_variance=[0.42, 0.18])


def scores(experiment: str = "eap", n_layers: int = 48) -> Result:
    """Of a fine graph with two positions: an edge of a position scores its index."""
    edges = Graph(n_layers, True, 2).edges()
    rows = [(*edge, float(index)) for index, edge in enumerate(edges)]
    return make(experiment, rows, "src dst position score", n_layers, n_rows=40)


def sizes() -> Result:
    rows = [(name, share, share**2) for name in ("signed", "absolute", "random") for share in (0.01, 0.1, 0.5, 1.0)]
    areas = {name: 0.5 for name in ("signed", "absolute", "random")}
    return make("faithfulness", rows, "ranking fraction faithfulness", cpr=areas, cmd=areas, n_rows=40)


def diagram(experiment: str, sizes: dict[str, int] = SIZES) -> Result:
    table = residual_edges(4) if experiment == "residual_graph" else ModelSizes.of(sizes).table()
    return Result.create(experiment, table, model=SimpleNamespace(model_id="tiny"), arguments={})


def lens() -> Result:
    rows = [
        (layer, position, f"pos{position}", 0.5 * layer * position, 0.1, 0.2, 0.5, 3.0, 40)
        for layer in range(-1, 6)
        for position in range(12)
    ]
    return make("logit_lens", rows, "layer position label logit_diff low high probability rank n", 6)


def direct() -> Result:
    writes = [(-1, "embed"), *((layer, part) for layer in range(6) for part in ("mixer", "mlp")), (-1, "bias")]
    rows = [(layer, part, 0.3 * layer, 0.3 * layer - 0.1, 0.3 * layer + 0.1, 40) for layer, part in writes]
    return make("direct_effects", rows, "layer part effect low high n", 6)


def knocked_out() -> Result:
    rows = [
        (source, target, layer, 0.1 * layer, 0.1 * layer - 0.05, 0.1 * layer + 0.05, 0.9, 40)
        for source in ("n1+1", "n4+1")
        for target in ("last", "n5")
        for layer in range(6)
    ]
    return make("knockout", rows, "source target layer effect low high accuracy n", 6, arguments={"window": 2})


def flow() -> Result:
    """In layer 1 each corruption's name goes on by a tap, and to the end by the scan; in layer 4 a little is lost."""
    rows = []
    for corruption, name in zip(CORRUPTIONS, (3, 5, 7, 15, 13), strict=True):
        found = [("edge", 1, "scan", name + 1, 19, 0.61), ("edge", 1, "conv", name, name + 1, 0.55)]
        found += [("edge", 4, "scan", name, 19, -0.05), ("edge", 2, "scan", name, 18, 0.01)]
        found += [
            ("layer", 1, "scan", -1, -1, 0.93),
            ("layer", 1, "conv", -1, -1, 0.9),
            ("before", 1, "both", -1, -1, 0.02),
        ]
        for part, layer, way, source, target, effect in found:
            ends = [TOKENS[at] if at >= 0 else "" for at in (source, target)]
            rows.append(
                (corruption, part, layer, way, source, target, *ends, effect, effect, effect - 0.1, effect + 0.1, 32)
            )
    columns = "corruption part layer way source target source_label target_label estimate effect low high n"
    labels = dict.fromkeys(CORRUPTIONS, TOKENS)
    return make("token_flow", rows, columns, 6, arguments={"layer": 1}, labels=labels)


def probed() -> Result:
    rows = [
        (layer, position, f"pos{position}", 0.1 * layer + 0.05 * position, 0.0, 1.0, 0.02 * position, 24, 40)
        for layer in range(4)
        for position in range(12)
    ]
    columns = "layer position label accuracy low high control classes n"
    return make("probe", rows, columns, 6, arguments={"site": "h", "what": "slot", "target": "answer"})


def several_probed() -> Result:
    rows = [
        (site, target, 1, mark, 0.1 * int(target[1]) + 0.2 * (mark == "last"), 0.0, 1.0, 0.01, 24, 40)
        for site in ("ssm_input", "h")
        for target in ("n1", "n2", "n3")
        for mark in ("n1+1", "n4-1", "last")
    ]
    return make("probes", rows, "site target layer mark accuracy low high control classes n", 6)


def features(measured: int = 20, size: int = 60) -> Result:
    effects = [0.5 / (k + 1) if k < measured else np.nan for k in range(size)]
    rows = [
        (-1 if k == 3 else 100 + k, effect, effect - 0.01, effect + 0.02, 0.6 / (k + 1), 40)
        for k, effect in enumerate(effects)
    ]
    where = {"site": "ssm_input", "layer": 1}
    return make("feature_effects", rows, "feature effect low high estimate n", 6, arguments=where)


def features_edges() -> Result:
    rows = [
        (source, target, 0.1 * source, 0.0, 0.5, 0.1 * source, 40) for source in (4, 2, -1) for target in (9, 1, 3, -1)
    ]
    sides = {side: {"site": site, "layer": 1} for side, site in (("upstream", "ssm_input"), ("downstream", "out_proj"))}
    return make("feature_edges", rows, "source target effect low high estimate n", 6, arguments=sides)


def features_kept() -> Result:
    rows = [
        (k, kept, value, value - 0.1, value + 0.1, value, value - 0.05, value + 0.05, 40)
        for kept, share in (("top", 1.0), ("random", 0.3))
        for k in (0, 1, 2, 4, 8, 100)
        for value in (share * k / 100,)
    ]
    columns = "k kept accuracy accuracy_low accuracy_high nld nld_low nld_high n"
    return make("feature_faithfulness", rows, columns, 6, arguments={"site": "ssm_input", "layer": 1})


EXAMPLES = {
    "architecture": lambda: diagram("architecture"),
    "residual_graph": lambda: diagram("residual_graph"),
    "resample_ablation": resample,
    "layer_removal": removal,
    "greedy_layer_removal": greedy,
    "cross_talk": cross,
    "state_similarity": similarity,
    "conv_slices": slices,
    "name_steering": steering,
    "name_pca": pca,
    "ssm_internals": lambda: diagram("ssm_internals"),
    "eap": scores,
    "exact_effects": lambda: scores("exact_effects"),
    "faithfulness": sizes,
    "knockout": knocked_out,
    "logit_lens": lens,
    "token_flow": flow,
    "direct_effects": direct,
    "probe": probed,
    "probes": several_probed,
    "feature_effects": features,
    "feature_edges": features_edges,
    "feature_faithfulness": features_kept,
    **CIRCUIT_EXAMPLES,
}


def heat_maps(figure: Figure) -> list:
    """The axes that hold cells, in the order of their drawing."""
    return [axes for axes in figure.axes if axes.collections and axes.get_label() != "<colorbar>"]


def colour_bars(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]


def cells(axes) -> np.ndarray:
    """The numbers that a heat map draws, first row first."""
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row must be at the top"
    return np.asarray(axes.collections[0].get_array())


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def extents(figure: Figure, texts) -> list:
    """The bounding boxes, in pixels, of the texts that are visible and not empty."""
    if not getattr(figure, "laid_out", False):
        figure.draw_without_rendering()
        figure.laid_out = True
    return [text.get_window_extent() for text in texts if text.get_visible() and text.get_text().strip()]


def assert_apart(boxes: list) -> None:
    for one, other in pairwise(boxes):
        assert not one.overlaps(other)


def assert_inside(figure: Figure, boxes: list) -> None:
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_every_figure_has_an_example_here():
    of_studies = {row.experiment for study in STUDIES.values() for row in study.rows}  # test_recall_study draws these
    assert EXAMPLES.keys() == FIGURES.keys() - of_studies


@pytest.mark.parametrize("experiment", EXAMPLES)
class TestEveryFigure:
    def test_is_drawn_titled_and_leaves_no_global_state(self, experiment):
        before = dict(matplotlib.rcParams)
        result = EXAMPLES[experiment]()
        table = result.table.copy()
        figure = result.plot()
        assert isinstance(figure, Figure)
        assert plt.get_fignums() == []
        assert dict(matplotlib.rcParams) == before
        pd.testing.assert_frame_equal(result.table, table)
        assert figure.get_facecolor() == (1, 1, 1, 1)

    def test_heading_fits_the_page(self, experiment):
        result = EXAMPLES[experiment]()
        long = Result(result.table, result.meta | {"model": "an-organisation/a-mamba-of-a-fairly-long-name-hf"})
        figure = long.plot()
        headings = [figure._suptitle] if figure._suptitle else figure.axes[0].texts
        assert_inside(figure, extents(figure, headings))

    def test_a_missing_column_is_named(self, experiment):
        result = EXAMPLES[experiment]()
        column = result.table.columns[1]
        with pytest.raises(ValueError, match=f"needs the column '{column}'"):
            Result(result.table.drop(columns=column), result.meta).plot()

    def test_an_empty_table_is_refused(self, experiment):
        result = EXAMPLES[experiment]()
        with pytest.raises(ValueError, match="at least one row"):
            Result(result.table[:0], result.meta).plot()


class TestTokenFlow:
    def test_arcs_lead_from_source_to_target(self):
        result = flow()
        figure = result.plot()
        panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
        assert [axes.get_title(loc="left") for axes in panels] == [c.replace("->", "→") for c in CORRUPTIONS]
        for axes, name in zip(panels, (3, 5, 7, 15, 13), strict=True):
            assert ticks(axes.yaxis) == ["layer 1", "layer 4"]  # layer 2's arc is too small to be shown
            assert ticks(axes.xaxis) == [token.replace("->", "→") for token in TOKENS]
            arcs = [line for line in axes.lines if len(line.get_xdata()) > 2]
            found = {tuple(np.round(np.asarray(arc.get_xdata())[[0, -1]]).astype(int)): arc for arc in arcs}
            assert set(found) == {(name + 1, 19), (name, name + 1), (name, 19)}
            assert found[name + 1, 19].get_ydata().max() > 0 > found[name, name + 1].get_ydata().min()  # above, below
            widths = [found[ends].get_linewidth() for ends in ((name + 1, 19), (name, name + 1), (name, 19))]
            assert widths == sorted(widths, reverse=True) and found[name, 19].get_linestyle() == "--"
            said = [text.get_text() for text in axes.texts]
            assert {".61", ".55", "scan .93", "conv .90"} <= set(said) and not any(".05" in text for text in said)
            assert axes.get_xlabel() == "everything between tokens before layer 1: .02"
        assert_inside(figure, extents(figure, [text for axes in panels for text in axes.texts]))


class TestProbes:
    def test_accuracy_stands_beside_the_control_on_one_scale(self):
        result = probed()
        one, other = heat_maps(result.plot())
        for axes, column in ((one, "accuracy"), (other, "control")):
            expected = result.table.pivot(index="layer", columns="position", values=column)
            np.testing.assert_allclose(cells(axes), expected)
            assert ticks(axes.xaxis) == [f"pos{position}" for position in range(12)]
            assert (axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) == (0, 1)
        assert ticks(one.yaxis) == ["0", "1", "2", "3"] and other.get_title() == "shuffled labels"
        assert "probes of the slot of answer in h" in result.plot()._suptitle.get_text()

    def test_several_sites_and_targets_have_a_row_each(self):
        figure = several_probed().plot()
        one, _ = heat_maps(figure)
        assert ticks(one.yaxis) == [
            f"{target} in {site} of layer 1" for site in ("ssm_input", "h") for target in ("n1", "n2", "n3")
        ]
        np.testing.assert_allclose(cells(one)[:3], [[0.1, 0.1, 0.3], [0.2, 0.2, 0.4], [0.3, 0.3, 0.5]])
        assert_inside(figure, extents(figure, one.get_yticklabels()))


class TestFeatureEffects:
    def test_what_was_measured_stands_beside_its_estimate(self):
        result = features()
        (axes,) = result.plot().axes
        measured, estimated = (next(line for line in axes.lines if line.get_marker() == mark) for mark in ("o", "x"))
        assert measured.get_ydata().tolist() == result.table["effect"][:20].tolist()
        assert estimated.get_ydata().tolist() == result.table["estimate"][:20].tolist()
        assert ticks(axes.xaxis)[2:5] == ["102", "error", "104"]

    def test_of_many_the_first_are_shown_and_the_others_counted(self):
        figure = features(measured=0).plot()
        (axes,) = figure.axes
        assert len(ticks(axes.xaxis)) == 40 and "20 more are not shown" in figure._suptitle.get_text()
        assert not [line for line in axes.lines if line.get_marker() == "o"]


class TestResampleAblation:
    @pytest.mark.parametrize("n_layers", [8, 48])
    def test_panels_show_the_table(self, n_layers):
        result = resample(n_layers)
        figure = result.plot()
        panels = heat_maps(figure)
        assert [axes.get_title().split("\n")[0] for axes in panels] == [c.replace("->", "→") for c in CORRUPTIONS]
        for corruption, axes in zip(CORRUPTIONS, panels, strict=True):
            rows = result.table[result.table["corruption"] == corruption]
            effects = {(row.layer, row.position): row.effect for row in rows.itertuples()}
            expected = [[effects[layer, position] for position in range(20)] for layer in range(n_layers)]
            np.testing.assert_array_equal(cells(axes), expected)
            assert ticks(axes.xaxis) == TOKENS
        assert ticks(panels[0].yaxis) == [str(layer) for layer in range(n_layers)]
        assert "layer_input" in figure._suptitle.get_text()

    def test_order_of_rows_does_not_matter(self):
        result = resample()
        shuffled = Result(result.table.sample(frac=1, random_state=0), result.meta)
        drawn = {axes.get_title(): cells(axes) for axes in heat_maps(shuffled.plot())}
        for axes in heat_maps(result.plot()):
            np.testing.assert_array_equal(drawn[axes.get_title()], cells(axes))

    def test_one_scale_centred_at_zero(self):
        result = resample()
        figure = result.plot()
        norms = {id(axes.collections[0].norm) for axes in heat_maps(figure)}
        norm = heat_maps(figure)[0].collections[0].norm
        assert len(norms) == 1 and len(colour_bars(figure)) == 1
        assert norm.vmax == -norm.vmin == result.table["effect"].abs().max()
        assert heat_maps(figure)[0].collections[0].cmap.name == "RdBu"
        assert norm(0) == 0.5
        assert "clipped" not in colour_bars(figure)[0].get_ylabel()

    @pytest.mark.parametrize(("outlier", "extend"), [(-7.3, "min"), (7.3, "max")])
    def test_an_outlier_is_clipped_and_said(self, outlier, extend):
        result = resample()
        result.table.loc[9, "effect"] = outlier
        figure = result.plot()
        norm = heat_maps(figure)[0].collections[0].norm
        assert (norm.vmin, norm.vmax) == (-1.5, 1.5)
        label = colour_bars(figure)[0].get_ylabel()
        assert label.endswith("colours clipped at ±1.5:\n1 cell beyond, up to 7.3")
        assert_inside(figure, extents(figure, [colour_bars(figure)[0].yaxis.label]))
        assert colour_bars(figure)[0]._colorbar.extend == extend

    def test_no_effect_at_all_is_white(self):
        result = resample()
        result.table["effect"] = 0.0
        norm = heat_maps(result.plot())[0].collections[0].norm
        assert (norm.vmin, norm.vmax) == (-1, 1)

    def test_some_layers_and_positions_only(self):
        result = resample()
        part = Result(
            result.table.query("layer in (2, 5) and position >= 12 and corruption == @CORRUPTIONS[1]"), result.meta
        )
        (axes,) = heat_maps(part.plot())
        assert ticks(axes.yaxis) == ["2", "5"] and ticks(axes.xaxis) == TOKENS[12:]

    def test_an_absent_cell_is_masked(self):
        result = resample()
        (first, *_) = heat_maps(Result(result.table.drop(index=21), result.meta).plot())
        array = first.collections[0].get_array()
        assert np.argwhere(np.ma.getmaskarray(array)).tolist() == [[1, 1]]

    def test_a_cell_given_twice_is_refused(self):
        result = resample()
        with pytest.raises(ValueError, match="two rows for layer 0 and position 0"):
            Result(pd.concat([result.table, result.table[:1]]), result.meta).plot()

    @pytest.mark.parametrize("n_layers", [8, 48])
    def test_labels_do_not_overlap(self, n_layers):
        figure = resample(n_layers).plot()
        panels = heat_maps(figure)
        for axes in panels:
            assert_apart(extents(figure, axes.get_xticklabels()))
        assert_apart(extents(figure, panels[0].get_yticklabels()))
        assert_apart(extents(figure, [axes.title for axes in panels]))
        texts = [text for axes in figure.axes for text in [*axes.get_xticklabels(), axes.title, axes.yaxis.label]]
        assert_inside(figure, extents(figure, [*texts, figure._suptitle]))

    def test_tokens_with_dollars_and_line_breaks_are_shown_as_they_are(self):
        result = resample()
        result.table["label"] = result.table["label"].replace({" Then": " $x^2$", " gave": "\n"})
        figure = result.plot()
        save_size = figure.draw_without_rendering()
        assert save_size is None
        labels = heat_maps(figure)[0].get_xticklabels()
        assert labels[1].get_text() == " $x^2$" and not labels[1].get_parse_math()
        assert labels[16].get_text() == "\\n"


class TestLayerRemoval:
    @pytest.mark.parametrize("n_layers", [6, 48])
    def test_bars_whiskers_and_baseline(self, n_layers):
        result = removal(n_layers)
        (axes,) = result.plot().axes
        rows = result.table[1:]
        assert [bar.get_height() for bar in axes.patches] == rows["probability"].tolist()
        assert ticks(axes.xaxis) == [str(layer) for layer in range(n_layers)]
        intervals = [["low", "high"], ["accuracy_low", "accuracy_high"]]
        for whiskers, columns in zip(axes.collections, intervals, strict=True):
            ends = np.array([segment[:, 1] for segment in whiskers.get_segments()])
            np.testing.assert_allclose(ends, rows[columns])
        dots = next(line for line in axes.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(dots.get_ydata(), rows["accuracy"])
        baseline = next(line for line in axes.lines if line.get_linestyle() == "--")
        assert set(baseline.get_ydata()) == {0.83}

    def test_needs_neither_intervals_nor_baseline(self):
        result = removal()
        (axes,) = Result(result.table[1:][["layer", "probability", "accuracy"]], result.meta).plot().axes
        assert len(axes.patches) == 8 and not axes.collections

    @pytest.mark.parametrize("example", [removal, greedy, cross])
    def test_labels_do_not_overlap_at_48_layers(self, example):
        figure = example(48).plot()
        assert_apart(extents(figure, figure.axes[0].get_xticklabels()))
        assert_apart(extents(figure, figure.axes[0].texts))


def test_greedy_removal_names_each_layer_in_order():
    result = greedy()
    axes = result.plot().axes[0]
    assert ticks(axes.xaxis) == ["none", *map(str, result.table["layer"][1:])]
    accuracy, probability, removable = axes.lines
    assert set(removable.get_xdata()) == {2.5} and "2 removed before accuracy falls" in removable.get_label()
    unharmed = Result(result.table, result.meta | {"removable": 8}).plot().axes[0]
    assert len(unharmed.lines) == 2
    assert len(axes.collections) == 1  # the band of the accuracy; the table has none for the probability
    np.testing.assert_array_equal(accuracy.get_ydata(), result.table["accuracy"])
    np.testing.assert_array_equal(probability.get_ydata(), result.table["probability"])


def test_cross_talk_shows_shares_of_all_sets():
    (axes,) = cross(8).plot().axes
    assert [bar.get_height() for bar in axes.patches] == [0, 0, 0, 1, 0, 0, 0, 0.25]
    assert [text.get_text() for text in axes.texts] == ["", "", "", "1.00", "", "", "", ".25"]


def test_pairs_without_a_minimal_set_are_left_out_and_counted():
    result = cross(8)
    without = Result(result.table, result.meta | {"unreached": [["a", corruption] for corruption in CORRUPTIONS[:4]]})
    figure = without.plot()
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 0, 0, 1, 0, 0, 0, 1 / 16]
    assert "16 sets, 4 without one" in figure._suptitle.get_text()


def test_state_similarity_has_a_square_panel_a_prompt():
    result = similarity(4)
    figure = result.plot()
    panels = heat_maps(figure)
    assert len(panels) == 4 and len(colour_bars(figure)) == 1
    for number, axes in enumerate(panels):
        rows = result.table[result.table["prompt"] == f"A prompt, number {number}"]
        size = len(TOKENS) - number
        np.testing.assert_array_equal(cells(axes), rows["similarity"].to_numpy().reshape(size, size))
        assert ticks(axes.xaxis) == ticks(axes.yaxis) == TOKENS[:size]
        assert (axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) == (-1, 1)
        assert_apart(extents(figure, axes.get_xticklabels()))
        assert_apart(extents(figure, axes.get_yticklabels()))


def test_conv_slices_stack_one_panel_a_corruption():
    result = slices()
    figure = result.plot()
    panels = heat_maps(figure)
    assert [axes.get_title() for axes in panels] == [c.replace("->", "→") for c in CORRUPTIONS]
    tops = [axes.get_position().y1 for axes in panels]
    assert tops == sorted(tops, reverse=True)
    for corruption, axes in zip(CORRUPTIONS, panels, strict=True):
        rows = result.table[result.table["corruption"] == corruption]
        np.testing.assert_array_equal(cells(axes), rows["effect"].to_numpy().reshape(4, 20))
        assert ticks(axes.yaxis) == ["−3", "−2", "−1", "0"] and ticks(axes.xaxis) == TOKENS
        assert_apart(extents(figure, axes.get_xticklabels()))
    assert len({id(axes.collections[0].norm) for axes in panels}) == len(colour_bars(figure)) == 1
    assert panels[0].collections[0].norm.vmin == -panels[0].collections[0].norm.vmax


class TestNameSteering:
    def test_numbers_stand_in_their_cells(self):
        result = steering()
        figure = result.plot()
        for method, title, axes in zip(
            ("replace", "subtract_add"), ("Replace", "Subtract and add"), heat_maps(figure), strict=True
        ):
            assert axes.get_title() == title
            assert ticks(axes.xaxis) == ticks(axes.yaxis) == list("12345")
            shown = {
                (text.get_position()[0] + 0.5, text.get_position()[1] + 0.5): text.get_text() for text in axes.texts
            }
            rows = result.table[result.table["method"] == method]
            assert shown == {(row.source_slot, row.target_slot): f"{row.success:.3f}" for row in rows.itertuples()}
            for row in rows.itertuples():
                assert cells(axes)[row.target_slot - 1, row.source_slot - 1] == row.success

    def test_a_pair_without_prompts_is_a_dash(self):
        result = steering()
        result.table.loc[0, ["success", "n"]] = [np.nan, 0]
        texts = [text.get_text() for axes in heat_maps(result.plot()) for text in axes.texts]
        assert texts.count("–") == 1 and len(texts) == 50


def test_name_pca_shows_every_mean_by_slot_and_a_few_names():
    result = pca()
    by_slot, by_name = result.plot().axes
    shown = np.concatenate([points.get_offsets() for points in by_slot.collections])
    expected = result.table.sort_values("slot", kind="stable")[["pc1", "pc2"]].to_numpy()
    np.testing.assert_array_equal(shown, expected)
    assert [text.get_text() for text in by_slot.get_legend().get_texts()] == [f"slot {slot}" for slot in range(1, 6)]
    assert len(by_name.collections[0].get_offsets()) == 200
    assert "42.0 %" in by_slot.get_xlabel() and "18.0 %" in by_slot.get_ylabel()
    for line in by_name.lines:
        rows = result.table[result.table["name"] == f" {line.get_label()}"]
        np.testing.assert_array_equal(line.get_xydata(), rows[["pc1", "pc2"]])


class TestDiagrams:
    @pytest.mark.parametrize("sizes", [SIZES, SSD_SIZES], ids=["mamba", "mamba2"])
    @pytest.mark.parametrize("experiment", ["architecture", "residual_graph", "ssm_internals"])
    def test_no_two_texts_overlap_and_none_leaves_the_page(self, experiment, sizes):
        figure = diagram(experiment, sizes).plot()
        boxes = extents(figure, figure.axes[0].texts)
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)
        assert_inside(figure, boxes)

    @pytest.mark.parametrize("sizes", [SIZES, SSD_SIZES], ids=["mamba", "mamba2"])
    def test_every_site_of_the_contract_is_in_figure_2_or_12(self, sizes):
        shown = set()
        for experiment in ("architecture", "ssm_internals"):
            shown |= {text.get_text() for text in diagram(experiment, sizes).plot().axes[0].texts}
        sites = (
            "embed resid_pre layer_input normalized_input skip in_proj conv conv_slice ssm_input A delta_2 B C "
            "delta A_bar B_bar h y ssm_output after_skip out_proj resid_post norm logits"
        )
        assert set(sites.split()) <= shown
        assert ("delta_1" in shown) == (sizes is SIZES)

    @pytest.mark.parametrize("name", ["tiny", "tiny-mamba2"])
    def test_the_shape_beside_each_site_is_the_sites(self, name):
        """Against the table of sites, where the conv's four taps are a letter."""
        model = mamba_ioi.load_model(name)
        sizes = ModelSizes.of(model)
        known, seen = model.known_sites(), set()
        for draw in (figures.architecture, figures.ssm_internals):
            texts = [text.get_text() for text in draw(sizes).axes[0].texts]
            for site, shape in pairwise(texts):
                if site in known and shape.startswith("["):
                    assert shape.replace(", 4]", ", K]") == f"[{', '.join(known[site].shape)}]", site
                    seen.add(site)
        assert seen == known.keys() - {"write", "h_start"}

    def test_sizes_are_the_models(self):
        texts = " ".join(text.get_text() for text in figures.architecture(SIZES).axes[0].texts)
        for part in ("1024 → 4096", "2048 → 1024", "[B, L, E, 4]", "layers i+1 … 47", "V (vocabulary) = 50280"):
            assert part in texts
        assert "(2048 → 96)" in " ".join(text.get_text() for text in figures.ssm_internals(SIZES).axes[0].texts)
        texts = " ".join(text.get_text() for text in figures.architecture(SSD_SIZES).axes[0].texts)
        for part in ("1024 → 4384", "2048 → 1024", "[B, L, X, 4]", "X = E + 2 G N = 2304"):
            assert part in texts
        texts = " ".join(text.get_text() for text in figures.ssm_internals(SSD_SIZES).axes[0].texts)
        assert "(2304 → 2048 + 128 + 128)" in texts and "x_proj" not in texts and "dt_proj" not in texts

    def test_sizes_from_attributes_and_what_is_missing(self):
        assert ModelSizes.of(SimpleNamespace(**SIZES)) == ModelSizes.of(SIZES)
        table = ModelSizes.of(mamba_ioi.load_model("tiny-mamba2")).table().set_index("size").value
        assert table.n_heads * table.head_dim == table.d_inner and "dt_rank" not in table
        with pytest.raises(ValueError, match="missing: head_dim"):
            ModelSizes.of(SIZES | {"n_heads": 3, "n_groups": 1})
        with pytest.raises(ValueError, match="missing: d_conv"):
            figures.architecture({name: size for name, size in SIZES.items() if name != "d_conv"})

    @pytest.mark.parametrize("n_layers", [1, 2, 4, 8])
    def test_residual_graph_has_every_edge(self, n_layers):
        axes = figures.residual_graph(n_layers).axes[0]
        arrows = [patch for patch in axes.patches if type(patch).__name__ == "FancyArrowPatch"]
        assert len(arrows) == len(residual_edges(n_layers)) == (n_layers + 2) * (n_layers + 1) // 2

    def test_residual_graph_refuses_what_is_not_legible(self):
        with pytest.raises(ValueError, match="1 to 8 layers, not 48"):
            figures.residual_graph(48)


class TestSaving:
    def test_png_and_pdf(self, tmp_path):
        png, pdf = save_figure(removal().plot(), tmp_path / "deep" / "fig5.1")
        assert (png.name, pdf.name) == ("fig5.1.png", "fig5.1.pdf")
        assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")
        height, width, _ = plt.imread(png).shape
        assert (width, height) == (1200, 720)
        assert sorted(path.name for path in png.parent.iterdir()) == ["fig5.1.pdf", "fig5.1.png"]

    def test_the_same_result_gives_the_same_files(self, tmp_path):
        one, other = (save_figure(cross().plot(), tmp_path / name / "fig6") for name in "ab")
        for first, second in zip(one, other, strict=True):
            assert first.read_bytes() == second.read_bytes()

    def test_a_failed_save_leaves_no_scraps(self, tmp_path):
        save_figure(removal().plot(), tmp_path / "fig5")
        broken = Figure()
        broken.savefig = lambda *_, **__: (_ for _ in ()).throw(OSError("no space left on device"))
        with pytest.raises(OSError, match="no space"):
            save_figure(broken, tmp_path / "fig5")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fig5.pdf", "fig5.png"]

    def test_notebooks_get_a_picture(self):
        assert removal().plot()._repr_png_().startswith(b"\x89PNG")


def test_figures_need_no_display_and_no_model():
    code = (
        "import sys, mamba_ioi.figures as f; "
        "f.residual_graph(4); print([m for m in ('torch', 'transformers', 'nnsight') if m in sys.modules])"
    )
    root = str(Path(mamba_ioi.__file__).parents[1])
    environment = {"MPLBACKEND": "TkAgg", "PATH": "", "HOME": "/nonexistent", "PYTHONPATH": root}
    environment["MPLCONFIGDIR"] = matplotlib.get_configdir()  # its cache of fonts takes half a minute to make
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("n_layers", [6, 48])
def test_scores_are_shown_between_layers_and_summed_over_positions(n_layers):
    result = scores(n_layers=n_layers)
    figure = result.plot()
    whole, clamped = heat_maps(figure)
    nodes = ["embed", *map(str, range(n_layers)), "output"]
    assert ticks(whole.yaxis) == nodes[:-1] and ticks(whole.xaxis) == nodes[1:]
    summed = result.table.groupby(["src", "dst"])["score"].sum()
    shown = np.ma.masked_invalid(cells(whole).reshape(n_layers + 1, -1))
    for i, src in enumerate(nodes[:-1]):
        for j, dst in enumerate(nodes[1:]):
            assert np.ma.is_masked(shown[i, j]) if j < i else shown[i, j] == summed[src, dst]
    assert "clamped" in clamped.get_title() and clamped.collections[0].norm.vmax < whole.collections[0].norm.vmax


def test_faithfulness_has_a_line_a_ranking():
    result = sizes()
    axes = sizes().plot().axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert [line.get_label().split()[0] for line in lines] == ["signed", "absolute", "random"]
    for line, (_, rows) in zip(lines, result.table.groupby("ranking", sort=False), strict=True):
        assert list(line.get_ydata()) == list(rows["faithfulness"])
        assert "CPR 0.500, CMD 0.500" in line.get_label()
