"""The catalogue: one row a figure, from the question that it answers to how it is computed, drawn and read.

The command line, `reproduce`, the report and `Result.plot` read it. Functions stand in it by their import path
(``package.module:name``) and are imported when they are called, so that the catalogue can be shown at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any, Literal

_EXPERIMENTS, _CIRCUITS, _MAKERS = "mamba_ioi.experiments", "mamba_ioi.circuits.pipeline", "mamba_ioi.reproduce.makers"
_FIGURES, _REPORT = "mamba_ioi.figures", "mamba_ioi.report"
EFFECT = "1: the answer follows the corrupt prompt all the way; 0: not at all"
_EFFECTS = ("corruption", "layer", "position", "label", "effect", "low", "high", "n")
_SCORES = ("accuracy", "accuracy_low", "accuracy_high", "probability", "low", "high", "n")
_MARKS = [*(mark for slot in range(1, 6) for mark in (f"n{slot}", f"n{slot}+1")), "last-1", "last"]
_OF_EACH = "10 of each corruption"
EXTRAS = {"probe": ("sklearn", "scikit-learn")}
"""By extra, the package that it brings: as it is imported, and as it is called."""
_HELD_OUT = 100
"""How many pairs the authors judge a circuit on, beside those that it was found on (App. D)."""
_CELL, _CIRCUIT, _EDGE, _STEP, _MEAN = 0.12, 1.5, 0.3, 2.6, 0.25
"""How many forwards take as long as: a patched run of a map, a circuit's run, a tested edge, a step backwards, and
a prompt of a mean, in a large batch."""


def _scored(sizes: Any, rows: int, edges: int) -> float:
    """Forwards behind scores by 5 steps and a minimal circuit of so many edges, judged on the held-out pairs too."""
    return rows * (5 * _STEP + _CIRCUIT * math.log2(edges)) + 4 * _HELD_OUT * _CIRCUIT


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure.

    Attributes:
        figure: its id, which names its files: ``fig4``; ``fig5_greedy`` for a second panel.
        experiment: the experiment's name on the command line.
        label: the figure's name in the report, as the paper has it.
        shows: what it shows, in a line.
        reading: how to read it, in a sentence.
        columns: of the result's table.
        function: computes the result (``package.module:name``). It is called with the model, with what ``input`` says,
            and with ``arguments``; ``progress=`` is given to a function that has it, ``layer=`` where ``takes_layer``.
        drawn_by: draws the result (``package.module:name``); unless given, the first of ``columns`` along the axis, and
            the one before ``low`` upwards.
        input: what the function gets: ``pairs`` drawn uniformly, ``balanced`` pairs (as many of each template and
            corruption), ``prompts`` (a few texts), ``names`` (``n_pairs=`` and ``seed=``: it draws its own pairs), or
            ``nothing``. Of another task: its pairs, or the first of them. ``subjects`` in a study: the function gets
            models by name in the model's place, ``pairs=`` and ``seed=``, and draws its own prompts.
        pairs: how many pairs are drawn if no other number is asked for, at least the paper's number (``balanced``: of
            each template and corruption); None where no number of them can be chosen.
        multiple: how many pairs to draw for each of ``pairs``, so that means over names are over enough of them.
        per_pair: what ``pairs`` counts, where it is not the pairs of the whole experiment.
        paper: how many pairs the paper takes, where that is another number.
        held_out: how many pairs of the next seed the function gets beside them as ``held_out=``, to judge on what it
            found; None where it takes none.
        templates: which templates the pairs are of.
        takes_layer: whether it looks at one layer, the bottleneck unless one is named.
        takes_channels: whether it can look at some of the channels of a Mamba-2's conv: those of x, B or C.
        needs_mamba: whether it works on Mambas only.
        needs_names: whether it speaks of the names in the prompts, so that it says nothing of other tasks.
        needs_dictionary: whether it looks at the features of a dictionary that ships for the model.
        needs_alignment: whether marks and last tokens stand at the same positions in all rows; where the function takes
            ``marks=``, unless it goes by these.
        forwards: as many forwards of one prompt take as long as the figure, about, from the model's sizes
            (`mamba_ioi.reproduce.plan.Sizes`) and the number of prompts: by what is on the page "What each method
            costs", and by what a part of a forward was measured to take.
        at_most: whether the number of rounds depends on the model, and ``forwards`` is the most.
        backwards: whether it needs a backward pass, and its memory.
        extra: the extra that installs the package which it needs beside the others: ``probe``; empty if it needs none.
        arguments: more arguments of the function.
        decides: for claims of the paper by their keys (`mamba_ioi.report.claims`), the rule that says from this figure
            whether the claim holds (``package.module:name``).
        tells: likewise, rules that only add to the picture.
    """

    figure: str
    experiment: str
    label: str
    shows: str
    reading: str
    columns: tuple[str, ...]
    function: str | Callable[..., Any]
    drawn_by: str = f"{_FIGURES}.intervals:intervals"
    input: Literal["pairs", "balanced", "prompts", "names", "nothing", "subjects"] = "pairs"
    pairs: int | None = 80
    multiple: int = 1
    per_pair: str = ""
    paper: str = ""
    held_out: int | None = None
    templates: str = "aligned"
    takes_layer: bool = False
    takes_channels: bool = False
    needs_mamba: bool = True
    needs_names: bool = False
    needs_dictionary: bool = False
    needs_alignment: bool = False
    forwards: Callable[[Any, int], float] = lambda sizes, rows: 0
    at_most: bool = False
    backwards: bool = False
    extra: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    decides: Mapping[str, str] = field(default_factory=dict)
    tells: Mapping[str, str] = field(default_factory=dict)

    @property
    def lacks(self) -> str | None:
        """In a sentence, the package that it needs and that is not installed; None if all is there."""
        package, name = EXTRAS.get(self.extra, ("", ""))
        if not package or find_spec(package) is not None:
            return None
        return f"it needs {name}: pip install 'mamba-ioi[{self.extra}]'"

    @property
    def draws(self) -> bool:
        """Whether prompts are drawn, so that the seed matters."""
        return self.input != "nothing"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question put to several models, which `reproduce` takes by its name (``--study``).

    Attributes:
        name: its name on the command line.
        title: heads its report.
        about: what it is, in a sentence or two under the title.
        source: whose claims they are, for the report.
        subjects: the packaged models by the subjects' names (``package.module:name``).
        questions: the claims that its report decides (``package.module:name``).
        rows: its figures.
    """

    name: str
    title: str
    about: str
    source: str
    subjects: str
    questions: str
    rows: tuple[Row, ...]

    @property
    def catalogue(self) -> dict[str, Row]:
        """The rows by the figure's id."""
        return {row.figure: row for row in self.rows}


ROWS = (
    Row(
        figure="fig2",
        experiment="architecture",
        label="Figure 2",
        shows="the model, one layer opened, with its hook points",
        reading="The model from tokens to logits, and one layer opened; the names are those of the activations.",
        columns=("size", "value"),
        function=f"{_MAKERS}:architecture",
        drawn_by=f"{_FIGURES}.architecture:of_result",
        input="nothing",
        pairs=None,
    ),
    Row(
        figure="fig3",
        experiment="residual_graph",
        label="Figure 3",
        shows="the residual stream as a graph of all edges",
        reading="Every layer reads the sum of all that was written before it: an edge for each writer and reader.",
        columns=("src", "dst"),
        function=f"{_MAKERS}:residual_graph",
        drawn_by=f"{_FIGURES}.residual_graph:of_result",
        input="nothing",
        pairs=None,
        needs_mamba=False,
    ),
    Row(
        figure="fig4",
        experiment="resample_ablation",
        label="Figure 4",
        shows="which layer inputs matter, by position",
        reading="A panel for each kind of pairs; rows are layers, columns tokens or marks. Each cell: the layer's "
        f"input resampled there ({EFFECT}).",
        columns=_EFFECTS,
        needs_alignment=True,
        function=f"{_EXPERIMENTS}.resample_ablation:resample_ablation",
        drawn_by=f"{_FIGURES}.resample_ablation:resample_ablation",
        paper=_OF_EACH,
        decides={"bottleneck": f"{_REPORT}.layers:resampled"},
        forwards=lambda s, rows: rows * s.layers * s.length * _CELL,
    ),
    Row(
        figure="fig4_marks",
        experiment="resample_ablation_marks",
        label="Figure 4 (marks)",
        shows="which layer inputs matter, by name, over all four templates",
        reading="As Figure 4, but columns are marks, each row's own: the five names, the token after each (n1+1), and "
        f"the last two tokens; so templates whose names stand elsewhere go into one map ({EFFECT}).",
        columns=("corruption", "layer", "mark", "effect", "low", "high", "n"),
        function=f"{_EXPERIMENTS}.resample_ablation:resample_ablation",
        drawn_by=f"{_FIGURES}.resample_ablation:resample_ablation",
        paper="none: left to future work",
        templates="all",
        needs_names=True,
        arguments={"marks": _MARKS},
        decides={"bottleneck": f"{_REPORT}.layers:resampled_by_mark"},
        forwards=lambda s, rows: rows * s.layers * len(_MARKS) * _CELL,
    ),
    Row(
        figure="fig5",
        experiment="layer_removal",
        label="Figure 5",
        shows="the answer without each layer",
        reading="The answer's mean probability among the candidates, and its accuracy, with each layer's output set to "
        "zero.",
        columns=("layer", *_SCORES),
        function=f"{_EXPERIMENTS}.layer_removal:layer_removal",
        drawn_by=f"{_FIGURES}.layer_removal:layer_removal",
        pairs=40,
        paper="10",
        templates="all",
        needs_mamba=False,
        decides={"task": f"{_REPORT}.layers:task", "bottleneck": f"{_REPORT}.layers:removed"},
        forwards=lambda s, rows: rows * s.layers * 0.55,
    ),
    Row(
        figure="fig5_greedy",
        experiment="greedy_layer_removal",
        label="Figure 5 (greedy)",
        shows="the answer as layer after layer is removed",
        reading="Accuracy as layers are removed one after another, each time the one that costs least.",
        columns=("step", "layer", *_SCORES),
        function=f"{_EXPERIMENTS}.layer_removal:greedy_layer_removal",
        drawn_by=f"{_FIGURES}.layer_removal:greedy_layer_removal",
        pairs=40,
        paper="10",
        templates="all",
        needs_mamba=False,
        tells={"bottleneck": f"{_REPORT}.layers:spared"},
        forwards=lambda s, rows: rows * s.layers * (s.layers + 1) / 2 * 0.55,
    ),
    Row(
        figure="fig6",
        experiment="cross_talk",
        label="Figure 6",
        shows="the layers that must move information between tokens",
        reading="In what share of the minimal sets, one for each kind of pairs, each layer is.",
        columns=("template", "corruption", "step", "layer", "accuracy", "low", "high", "probability", "n"),
        function=f"{_EXPERIMENTS}.cross_talk:cross_talk",
        drawn_by=f"{_FIGURES}.cross_talk:cross_talk",
        input="balanced",
        pairs=200,
        per_pair="of each template and corruption",
        templates="all",
        decides={"bottleneck": f"{_REPORT}.layers:cross_talk"},
        forwards=lambda s, rows: rows * s.layers * (s.layers + 1) / 2 * 0.6,
        at_most=True,
    ),
    Row(
        figure="fig7",
        experiment="state_similarity",
        label="Figure 7",
        shows="how long a token's contribution stays in the state",
        reading="Cosine of what each token adds to the state (rows) with the state after each token (columns).",
        columns=("prompt", "i", "j", "similarity", "label_i", "label_j"),
        function=f"{_EXPERIMENTS}.state_similarity:state_similarity",
        drawn_by=f"{_FIGURES}.state_similarity:state_similarity",
        input="prompts",
        pairs=None,
        takes_layer=True,
        tells={"shift": f"{_REPORT}.convolution:lines"},
        forwards=lambda s, rows: 3,
    ),
    Row(
        figure="fig8",
        experiment="conv_slices",
        label="Figure 8",
        shows="which tap of the conv brings in what differs",
        reading="A panel for each kind of pairs; rows are taps of the convolution, columns its output positions "
        f"({EFFECT}).",
        columns=("corruption", "slice", "position", "label", "effect", "low", "high", "n"),
        needs_alignment=True,
        function=f"{_EXPERIMENTS}.conv_slices:conv_slices",
        drawn_by=f"{_FIGURES}.conv_slices:conv_slices",
        paper=_OF_EACH,
        takes_layer=True,
        takes_channels=True,
        decides={"shift": f"{_REPORT}.convolution:taps"},
        forwards=lambda s, rows: rows * s.taps * s.length * _CELL,
    ),
    Row(
        figure="fig9",
        experiment="name_steering",
        label="Figure 9",
        shows="whether a name's mean activation writes that name",
        reading="The share of test prompts where the name that was written in wins; columns are the slot its mean is "
        "from, rows the slot it is written into.",
        columns=("method", "source_slot", "target_slot", "success", "low", "high", "n"),
        function=f"{_EXPERIMENTS}.name_steering:name_steering",
        drawn_by=f"{_FIGURES}.name_steering:name_steering",
        input="names",
        multiple=125,
        per_pair="times 125",
        templates="all",
        takes_layer=True,
        needs_names=True,
        decides={"linear": f"{_REPORT}.steering:steering"},
        forwards=lambda s, rows: _MEAN * rows + 5 * 101 * 10 * 0.5,
        tells={"slots": f"{_REPORT}.steering:across_slots"},
    ),
    Row(
        figure="fig9_pca",
        experiment="name_pca",
        label="Figure 9 (plane)",
        shows="the names' mean activations in a plane",
        reading="Each point is the mean activation of one name in one slot.",
        columns=("name", "slot", "pc1", "pc2", "n"),
        function=f"{_EXPERIMENTS}.name_steering:name_pca",
        drawn_by=f"{_FIGURES}.name_steering:name_pca",
        input="names",
        multiple=125,
        per_pair="times 125",
        templates="all",
        takes_layer=True,
        needs_names=True,
        tells={"linear": f"{_REPORT}.steering:plane"},
        forwards=lambda s, rows: _MEAN * rows,
    ),
    Row(
        figure="fig10",
        experiment="resample_ablation_h",
        label="Figure 10",
        shows="which SSM states matter, by position",
        reading="As Figure 4, for the state of the SSM: later states follow from the one that is resampled "
        f"({EFFECT}).",
        columns=_EFFECTS,
        needs_alignment=True,
        function=f"{_EXPERIMENTS}.resample_ablation:resample_ablation",
        drawn_by=f"{_FIGURES}.resample_ablation:resample_ablation",
        paper=_OF_EACH,
        arguments={"site": "h"},
        decides={"shift": f"{_REPORT}.convolution:states"},
        forwards=lambda s, rows: rows * s.layers * s.length * _CELL,
    ),
    Row(
        figure="fig11",
        experiment="resample_ablation_out_proj",
        label="Figure 11",
        shows="which layer outputs matter, by position",
        reading=f"As Figure 4, for what each layer adds to the residual stream ({EFFECT}).",
        columns=_EFFECTS,
        needs_alignment=True,
        function=f"{_EXPERIMENTS}.resample_ablation:resample_ablation",
        drawn_by=f"{_FIGURES}.resample_ablation:resample_ablation",
        paper=_OF_EACH,
        arguments={"site": "out_proj"},
        decides={"last": f"{_REPORT}.circuit:written"},
        forwards=lambda s, rows: rows * s.layers * s.length * _CELL,
    ),
    Row(
        figure="fig12",
        experiment="ssm_internals",
        label="Figure 12",
        shows="inside the selective SSM, with its hook points",
        reading="Inside the selective SSM; the names are those of the activations.",
        columns=("size", "value"),
        function=f"{_MAKERS}:ssm_internals",
        drawn_by=f"{_FIGURES}.ssm_internals:of_result",
        input="nothing",
        pairs=None,
    ),
    Row(
        figure="appd1",
        experiment="edge_matrices",
        label="Appendix D.1",
        shows="the minimal circuit, every edge's attribution, measured effects",
        reading="Rows are sources, columns destinations: the edges that are kept, each edge's attribution (also with "
        "colours clamped), and measured effects.",
        columns=("src", "dst", "position", "score", "kept", "effect"),
        function=f"{_CIRCUITS}:edge_matrices",
        drawn_by=f"{_FIGURES}.circuit_matrices:circuit_matrices",
        pairs=200,
        held_out=_HELD_OUT,
        needs_mamba=False,
        decides={"circuit": f"{_REPORT}.circuit:minimal"},
        forwards=lambda s, rows: _scored(s, rows, s.edges) + rows * s.edges * _EDGE,
        at_most=True,
        backwards=True,
    ),
    Row(
        figure="appd2",
        experiment="layer_parts",
        label="Appendix D.2",
        shows="which conv slices, SSMs and skips ACDC keeps",
        reading="For each layer, which of its conv slices, its skip and its SSM ACDC keeps, and how much the metric "
        "falls without each.",
        columns=("src", "dst", "position", "kept", "effect"),
        function=f"{_CIRCUITS}:layer_parts",
        drawn_by=f"{_FIGURES}.circuit_matrices:layer_parts",
        pairs=200,
        held_out=_HELD_OUT,
        decides={"shift": f"{_REPORT}.convolution:kept_taps", "circuit": f"{_REPORT}.circuit:fine"},
        forwards=lambda s, rows: _scored(s, rows, s.edges) + rows * (s.edges + 2 * (s.taps + 1) * s.layers) * _EDGE,
        at_most=True,
        backwards=True,
    ),
    Row(
        figure="appd3",
        experiment="positional_circuit",
        label="Appendix D.3",
        shows="the minimal circuit by positions: graph, page, tables, layers",
        reading="The circuit from embed to output; labels say at which positions an edge is kept.",
        columns=("src", "dst", "position", "score", "kept"),
        needs_alignment=True,
        function=f"{_CIRCUITS}:positional_circuit",
        drawn_by=f"{_FIGURES}.circuit_graph:circuit_graph",
        pairs=200,
        held_out=_HELD_OUT,
        needs_mamba=False,
        decides={"circuit": f"{_REPORT}.circuit:positional"},
        forwards=lambda s, rows: _scored(s, rows, s.edges * s.length),
        backwards=True,
    ),
    Row(
        figure="sec44",
        experiment="last_position_only",
        label="Section 4.4",
        shows="that circuit without what a layer sends before the last position",
        reading="Accuracy and mean NLD of the positional circuit, whole and without the bottleneck's edges before the "
        "last position.",
        columns=("circuit", "n_edges", "nld", "accuracy", "kl", "accuracy_low", "accuracy_high", "nld_low", "nld_high"),
        needs_alignment=True,
        function=f"{_CIRCUITS}:last_position",
        drawn_by=f"{_FIGURES}.last_position:last_position_only",
        pairs=200,
        held_out=_HELD_OUT,
        takes_layer=True,
        decides={"last": f"{_REPORT}.circuit:cut"},
        forwards=lambda s, rows: _scored(s, rows, s.edges * s.length),
        backwards=True,
    ),
    Row(
        figure="knockout",
        experiment="knockout",
        label="Knockout",
        shows="in which layers a name's write reaches the last position",
        reading="A line for each source: 1 - NLD with what it gives to the last position taken out of one layer's scan "
        "(1: the answer follows the corrupt prompt, 0: nothing changes).",
        columns=(
            *("source", "target", "layer", "effect", "low", "high"),
            *("accuracy", "accuracy_low", "accuracy_high", "n"),
        ),
        function=f"{_EXPERIMENTS}.knockout:knockout",
        drawn_by=f"{_FIGURES}.knockout:knockout",
        arguments={"sources": ("n1+1", "n2+1", "n3+1", "n4+1", "n5+1")},
        needs_names=True,
        forwards=lambda s, rows: rows * 5 * s.layers * _CELL,
    ),
    Row(
        figure="flow",
        experiment="token_flow",
        label="Token to token",
        shows="which layer moves what from where to where",
        reading="A panel for each kind of pairs, with a lane for each layer that moves something. An arc leads to a "
        "token on its right, above the lane by the scan, below it by the conv; its width and number are the effect of "
        f"resampling that term alone ({EFFECT}). Beside a lane, and below a panel: all terms of the layer at once, or "
        "of the layers before and after the bottleneck.",
        columns=(
            *("corruption", "part", "layer", "way", "source", "target", "source_label", "target_label"),
            *("estimate", "effect", "low", "high", "n"),
        ),
        needs_alignment=True,
        function="mamba_ioi.circuits.token_flow:token_flow",
        drawn_by=f"{_FIGURES}.token_flow:token_flow",
        paper="none: an open question",
        takes_layer=True,
        decides={"exchange": f"{_REPORT}.flow:exchange"},
        forwards=lambda s, rows: rows * (5 * _STEP + 0.85 * s.layers),
        backwards=True,
    ),
    Row(
        figure="lens",
        experiment="logit_lens",
        label="Logit lens",
        shows="what the stream says of the answer after each layer",
        reading="Rows are layers, columns tokens or marks: the logit difference that the final norm and the head give "
        "of the residual stream there (above 0: the right answer is ahead of the corrupt prompt's).",
        columns=("layer", "position", "label", "logit_diff", "low", "high", "probability", "rank", "n"),
        function=f"{_EXPERIMENTS}.logit_lens:logit_lens",
        drawn_by=f"{_FIGURES}.logit_lens:logit_lens",
        needs_mamba=False,
        tells={"later": "mamba_ioi.report.reading:lens"},
        forwards=lambda s, rows: rows * 8,
    ),
    Row(
        figure="direct",
        experiment="direct_effects",
        label="Direct effects",
        shows="what each layer writes of the answer at the last position",
        reading="A point for each write to the last position: what it adds to the logit difference, the final norm's "
        "scale as it is in the run. The points add up to the logit difference.",
        columns=("layer", "part", "effect", "low", "high", "n"),
        function=f"{_EXPERIMENTS}.direct_effects:direct_effects",
        drawn_by=f"{_FIGURES}.direct_effects:direct_effects",
        needs_mamba=False,
        decides={"later": "mamba_ioi.report.reading:later_layers"},
        forwards=lambda s, rows: rows * 2,
    ),
    Row(
        figure="probe",
        experiment="probes",
        label="Probes",
        shows="what a linear probe reads of the first three names in the bottleneck, and where",
        reading="Rows are the slot whose name is read and what it is read off, columns places: n1+1 is a token after "
        "the first name, n4-1 one before the names come again. Left: the share of prompts that the probe has not seen "
        "and reads right; right: the same with shuffled labels. Who knows the three names without their slots is "
        "right in 1 of 3.",
        columns=("site", "target", "layer", "mark", "accuracy", "low", "high", "control", "classes", "n"),
        function=f"{_EXPERIMENTS}.probe:probes",
        drawn_by=f"{_FIGURES}.probe:probe",
        multiple=5,
        per_pair="times 5",
        paper="none: left to future work",
        templates="all",
        takes_layer=True,
        needs_names=True,
        extra="probe",
        arguments={
            "sites": ("ssm_input", "h"),
            "targets": ("n1", "n2", "n3"),
            "marks": ("n1+1", "n2+1", "n3+1", "n4-1", "last"),
        },
        decides={"slots": f"{_REPORT}.reading:slots"},
        forwards=lambda s, rows: rows * 20,  # most of it in fitting the probes
    ),
    Row(
        figure="features",
        experiment="feature_effects",
        label="Features",
        shows="what the features of a dictionary at the bottleneck do for the answer",
        reading="A point for each of the features with the largest estimates, and for what the dictionary does not "
        f"explain (error): the feature takes the corrupt prompt's value at all positions ({EFFECT}).",
        columns=("feature", "effect", "low", "high", "estimate", "n"),
        function=f"{_EXPERIMENTS}.packaged_features:packaged_effects",
        drawn_by=f"{_FIGURES}.features:feature_effects",
        needs_dictionary=True,
        tells={"dictionary": f"{_REPORT}.features:effects"},
        forwards=lambda s, rows: rows * (10 * _STEP + 20),
        backwards=True,
    ),
    Row(
        figure="features_edges",
        experiment="feature_edges",
        label="Features (edges)",
        shows="which features of the bottleneck's scan drive which of what it writes",
        reading="Rows are features of the scan's input, columns those of what the layer writes: how far the column's "
        "feature goes toward the corrupt prompt's value when the row's takes that value (1: all the way).",
        columns=("source", "target", "effect", "low", "high", "estimate", "n"),
        function=f"{_EXPERIMENTS}.packaged_features:packaged_edges",
        drawn_by=f"{_FIGURES}.features:feature_edges",
        needs_dictionary=True,
        tells={"dictionary": f"{_REPORT}.features:edges"},
        forwards=lambda s, rows: rows * (20 * 10 * _STEP / 3),
        backwards=True,
    ),
    Row(
        figure="features_kept",
        experiment="feature_faithfulness",
        label="Features (circuits)",
        shows="how well a number of features do the task alone, beside random ones",
        reading="All features but so many, and what the dictionary does not explain, are resampled. Bands: bootstrap "
        "intervals; of random features the range of the draws.",
        columns=(
            *("k", "kept", "accuracy", "accuracy_low", "accuracy_high"),
            *("nld", "nld_low", "nld_high", "n"),
        ),
        function=f"{_EXPERIMENTS}.packaged_features:packaged_faithfulness",
        drawn_by=f"{_FIGURES}.features:feature_faithfulness",
        held_out=_HELD_OUT,
        needs_dictionary=True,
        decides={"dictionary": f"{_REPORT}.features:circuits"},
        forwards=lambda s, rows: rows * 10 * _STEP + 2 * _HELD_OUT * 9 * 6,
        backwards=True,
    ),
)
"""Every figure, in the paper's order."""

CATALOGUE: dict[str, Row] = {row.figure: row for row in ROWS}
"""The rows by the figure's id."""


def _recall(figure: str, label: str, shows: str, reading: str, columns: str, drawn_by: str, **decides: str) -> Row:
    """A figure of the recall study; its rules are in `mamba_ioi.report.recall`."""
    return Row(
        figure=figure,
        experiment=figure,
        label=label,
        shows=shows,
        reading=reading,
        columns=tuple(columns.split()),
        function=f"{_EXPERIMENTS}.recall:{figure}",
        drawn_by=f"{_FIGURES}.recall:{drawn_by}",
        input="subjects",
        pairs=200,
        per_pair="prompts of each kind",
        needs_mamba=False,
        decides={claim: f"{_REPORT}.recall:{rule}" for claim, rule in decides.items()},
    )


RECALL = Study(
    name="recall",
    title="How four architectures recall",
    about="Associative recall (keys and values in pairs, then a key, whose value follows) in a Mamba, a Mamba without "
    "its short convolution, a Mamba-2 and a transformer with attention, each of 2 layers, trained here. In a changed "
    "prompt the key or the value that the query asks for is another one; interchange puts one activation of the "
    "original prompt back into it.",
    source="arXiv 2505.15105",
    subjects="mamba_ioi.zoo:RECALL",
    questions=f"{_REPORT}.recall:QUESTIONS",
    rows=(
        _recall(
            "recall_accuracy",
            "Accuracy",
            "how often each subject is right, by the number of pairs",
            "A line for each subject; they were trained on prompts of 6 pairs.",
            "subject pairs accuracy low high n",
            "accuracy",
            learned="learned",
            fails="fails",
        ),
        _recall(
            "recall_distance",
            "Distance",
            "how often each subject is right, by how far back the key stands",
            "A line for each subject, over the number of tokens from the key to the query.",
            "subject distance accuracy low high n",
            "accuracy",
        ),
        _recall(
            "recall_interchange",
            "Interchange",
            "where the original's activation brings the right answer back",
            "A panel for each subject and changed token; rows are layers and components, columns places. 1: the right "
            "answer is as probable again as in the original prompt; grey: the change takes nothing, or no prompt has "
            "the place.",
            "subject change layer component place restored low high original changed n",
            "interchange",
            induction="induction",
            heads="heads",
            transformer="transformer",
            conv="conv",
        ),
        _recall(
            "recall_edges",
            "Edges",
            "which tap of the conv, or which edge of the scan, carries what was changed",
            "A panel for each subject and changed token; rows are edges between tokens, columns a layer's conv (the "
            "tap that reaches so far) and scan. 1: this edge alone brings the right answer back.",
            "subject change layer via source target lost lost_low lost_high restored low high n",
            "edges",
            conv="taps",
        ),
        _recall(
            "recall_attention",
            "At the query",
            "what the query looks at, by the scan's hidden attention or by attention",
            "Rows are layers, columns the token whose write is read at the query; its share of all.",
            "subject layer source share low high n",
            "looked_at",
        ),
        _recall(
            "recall_attribution",
            "Attribution",
            "interchange as attribution estimates it",
            "As the interchange, for the logit difference, to first order.",
            "subject change layer component place estimate low high n",
            "interchange",
            estimated="estimated",
        ),
    ),
)
"""The recall study: which architecture does it by what."""

STUDIES: dict[str, Study] = {RECALL.name: RECALL}
"""The studies by name."""

EVERY: dict[str, Row] = CATALOGUE | {
    figure: row for study in STUDIES.values() for figure, row in study.catalogue.items()
}
"""Every row, the studies' too, by the figure's id."""

ALSO_DRAWN = {
    "probe": f"{_FIGURES}.probe:probe",
    "eap": f"{_FIGURES}.circuit_matrices:edge_scores",
    "exact_effects": f"{_FIGURES}.circuit_matrices:edge_scores",
    "faithfulness": f"{_FIGURES}.faithfulness:faithfulness",
}
"""What draws results that are no figure of `reproduce`, by ``meta["experiment"]``."""


def choose(only: str | None, rows: Mapping[str, Row] = CATALOGUE) -> list[str]:
    """The figures' ids, in the order of the rows; ``fig5`` stands for ``fig5`` and ``fig5_greedy``.

    Raises:
        ValueError: for an id that is not there, or none at all.
    """
    if only is None:
        return list(rows)
    chosen = set()
    for name in (part.strip() for part in only.split(",")):
        fitting = [figure for figure in rows if figure == name or figure.startswith(f"{name}_")] if name else []
        if not fitting:
            raise ValueError(f"there is no figure {name!r}; there are {', '.join(rows)}")
        chosen.update(fitting)
    return [figure for figure in rows if figure in chosen]


def drawers() -> dict[str, str]:
    """What draws a result, by ``meta["experiment"]``, in the paper's order.

    A row with a function that has a row before is another run of that experiment, and its results bear that name.
    """
    first: dict[Any, Row] = {}
    for row in EVERY.values():
        first.setdefault(row.function, row)
    return {row.experiment: row.drawn_by for row in first.values()} | ALSO_DRAWN


def drawer(experiment: str) -> Callable[..., Any]:
    """What draws the results of an experiment, from a `Result` to a matplotlib Figure.

    Args:
        experiment: the result's ``meta["experiment"]``.

    Raises:
        ValueError: no figure is known for that experiment.
    """
    known = drawers()
    if experiment not in known:
        raise ValueError(f"no figure is known for the experiment {experiment!r}; there are {', '.join(known)}")
    return resolve_name(known[experiment])
