"""The figures that `reproduce` can make: how each result is computed, and what it shows, by the figure's id.

Nothing here imports torch before something is to be computed, so that the table can be shown at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import CausalLM
    from .result import Result

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a figure is asked for with.

    Attributes:
        model: as for `load_model`.
        pairs: how many pairs, instead of each figure's own number.
        seed: of the prompts.
        layer: the layer to look at where one is needed, instead of the bottleneck.
        device: where to compute; the CPU unless given.
        dtype: the precision of the weights, instead of the checkpoint's.
        remote: the NDIF server to run on, as for `load_model`.
        memory: how many bytes to use, about, instead of half of what is free.
        progress: show bars.
    """

    model: str = "tiny"
    pairs: int | None = None
    seed: int = 27
    layer: int | None = None
    device: str | None = None
    dtype: str | None = None
    remote: bool | str = False
    memory: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class Maker:
    """How a figure's result is computed, and what can be said of it before torch is there.

    Attributes:
        experiment: the experiment's name on the command line.
        shows: what the figure shows, in a line.
        columns: of the result's table.
        make: computes the result.
        pairs: how many pairs it takes if no other number is asked for; None where no number of them can be chosen.
        per_pair: what ``pairs`` counts, where it is not the pairs of the whole experiment.
        paper: how many pairs the paper takes, where that is another number.
        draws: whether prompts are drawn, so that the seed matters.
        takes_layer: whether it looks at one layer.
        needs_mamba: whether it works on Mambas only.
    """

    experiment: str
    shows: str
    columns: tuple[str, ...]
    make: Callable[[CausalLM, Settings], Result]
    pairs: int | None = None
    per_pair: str = ""
    paper: str = ""
    draws: bool = True
    takes_layer: bool = False
    needs_mamba: bool = True


def _experiment(name: str, shows: str, columns: str, **options: Any) -> Maker:
    """An experiment of `mamba_ioi.experiments.EXPERIMENTS`."""

    def make(model: CausalLM, settings: Settings) -> Result:
        from .experiments import EXPERIMENTS

        experiment = EXPERIMENTS[name]
        layer = settings.layer if experiment.takes_layer else None
        return experiment(model, pairs=settings.pairs, seed=settings.seed, layer=layer, progress=settings.progress)

    return Maker(name, shows, tuple(columns.split()), make, **options)


def _sizes(name: str, shows: str) -> Maker:
    """A diagram of a Mamba that states the model's sizes."""

    def make(model: CausalLM, settings: Settings) -> Result:
        from .figures import ModelSizes
        from .result import Result

        return Result.create(name, ModelSizes.of(model).table(), model=model, arguments={})

    return Maker(name, shows, ("size", "value"), make, draws=False)


def _residual_graph(model: CausalLM, settings: Settings) -> Result:
    from .figures import residual_edges
    from .result import Result

    shown = model.n_layers if model.n_layers <= 8 else 4
    return Result.create("residual_graph", residual_edges(shown), model=model, arguments={"layers_shown": shown})


def _circuit(name: str, experiment: str, shows: str, columns: str, **options: Any) -> Maker:
    """A result of `mamba_ioi.circuits.pipeline`, from its function of that name."""

    def make(model: CausalLM, settings: Settings) -> Result:
        from .circuits import pipeline

        layer = {"layer": settings.layer} if options.get("takes_layer") else {}
        arguments = {"pairs": settings.pairs, "seed": settings.seed, "progress": settings.progress, **layer}
        result = getattr(pipeline, name)(model, **arguments)
        return _beside_the_paper(result, model.model_id)

    return Maker(experiment, shows, tuple(columns.split()), make, pairs=200, **options)


def _beside_the_paper(result: Result, model_id: str) -> Result:
    """The result, of mamba-370m with its agreement with the authors' edges in ``meta["paper"]``, and in the log."""
    from . import reference
    from .circuits.pipeline import circuit_of
    from .result import Result

    if "circuit" not in result.meta or not reference.is_paper_model(model_id):
        return result
    tables = [reference.compare_circuit(circuit_of(result))]
    if result.meta["experiment"] == "edge_matrices":
        tables.append(reference.compare_scores(result))
    for table in tables:
        logger.warning("compared with the authors' circuit of mamba-370m:\n%s", table.to_string(index=False))
    paper = [table.astype(object).where(table.notna(), None).to_dict("records") for table in tables]
    return Result(result.table, result.meta | {"paper": paper})


_EFFECTS = "corruption layer position label effect low high n"
_OF_EACH = "10 of each corruption"
_SCORES = "accuracy accuracy_low accuracy_high probability low high n"

MAKERS: dict[str, Maker] = {
    "fig2": _sizes("architecture", "the model, one layer opened, with its hook points"),
    "fig3": Maker(
        "residual_graph",
        "the residual stream as a graph of all edges",
        ("src", "dst"),
        _residual_graph,
        draws=False,
        needs_mamba=False,
    ),
    "fig4": _experiment(
        "resample_ablation", "which layer inputs matter, by position", _EFFECTS, pairs=80, paper=_OF_EACH
    ),
    "fig5": _experiment(
        "layer_removal", "the answer without each layer", f"layer {_SCORES}", pairs=40, paper="10", needs_mamba=False
    ),
    "fig5_greedy": _experiment(
        "greedy_layer_removal",
        "the answer as layer after layer is removed",
        f"step layer {_SCORES}",
        pairs=40,
        paper="10",
        needs_mamba=False,
    ),
    "fig6": _experiment(
        "cross_talk",
        "the layers that must move information between tokens",
        "template corruption step layer accuracy low high probability n",
        pairs=200,
        per_pair="of each template and corruption",
    ),
    "fig7": _experiment(
        "state_similarity",
        "how long a token's contribution stays in the state",
        "prompt i j similarity label_i label_j",
        takes_layer=True,
    ),
    "fig8": _experiment(
        "conv_slices",
        "which tap of the conv brings the names",
        "corruption slice position label effect low high n",
        pairs=80,
        paper=_OF_EACH,
        takes_layer=True,
    ),
    "fig9": _experiment(
        "name_steering",
        "whether a name's mean activation writes that name",
        "method source_slot target_slot success low high n",
        pairs=80,
        per_pair="times 125",
        takes_layer=True,
    ),
    "fig9_pca": _experiment(
        "name_pca",
        "the names' mean activations in a plane",
        "name slot pc1 pc2 n",
        pairs=80,
        per_pair="times 125",
        takes_layer=True,
    ),
    "fig10": _experiment(
        "resample_ablation_h", "which SSM states matter, by position", _EFFECTS, pairs=80, paper=_OF_EACH
    ),
    "fig11": _experiment(
        "resample_ablation_out_proj", "which layer outputs matter, by position", _EFFECTS, pairs=80, paper=_OF_EACH
    ),
    "fig12": _sizes("ssm_internals", "inside the selective SSM, with its hook points"),
    "appd1": _circuit(
        "edge_matrices",
        "edge_matrices",
        "the minimal circuit, every edge's attribution, measured effects",
        "src dst position score kept effect",
        needs_mamba=False,
    ),
    "appd2": _circuit(
        "layer_parts",
        "layer_parts",
        "which conv slices, SSMs and skips ACDC keeps",
        "src dst position kept effect",
    ),
    "appd3": _circuit(
        "positional_circuit",
        "positional_circuit",
        "the minimal circuit by positions: graph, page, tables, layers",
        "src dst position score kept",
        needs_mamba=False,
    ),
    "sec44": _circuit(
        "last_position",
        "last_position_only",
        "that circuit without what a layer sends before the last position",
        "circuit n_edges nld accuracy kl accuracy_low accuracy_high nld_low nld_high",
        takes_layer=True,
    ),
}
"""Every figure by its id, in the paper's order."""


def choose(only: str | None) -> list[str]:
    """The figures' ids, in the paper's order; ``fig5`` stands for ``fig5`` and ``fig5_greedy``.

    Raises:
        ValueError: for an id that is not there, or none at all.
    """
    if only is None:
        return list(MAKERS)
    chosen = set()
    for name in (part.strip() for part in only.split(",")):
        fitting = [figure for figure in MAKERS if figure == name or figure.startswith(f"{name}_")] if name else []
        if not fitting:
            raise ValueError(f"there is no figure {name!r}; there are {', '.join(MAKERS)}")
        chosen.update(fitting)
    return [figure for figure in MAKERS if figure in chosen]


def prepare(settings: Settings, figures: Sequence[str]) -> tuple[CausalLM, list[str]]:
    """The model, and which of the figures it can have; what would fail in every one of them is refused here.

    Raises:
        ValueError: for a model that cannot be loaded, a layer that it does not have, or a tokenizer without names.
    """
    from .dataset import IOIDataset
    from .experiments.common import check_layer
    from .model import load_model

    model = load_model(settings.model, device=settings.device, dtype=settings.dtype, remote=settings.remote)
    model.memory = settings.memory
    if settings.layer is not None:
        check_layer(model, settings.layer)
    if any(MAKERS[figure].draws for figure in figures):
        if model.tokenizer is None:
            raise ValueError(f"{settings.model} has no tokenizer, which is needed to draw prompts")
        IOIDataset.generate(model.tokenizer, 1, seed=settings.seed, templates="all")
    return model, [figure for figure in figures if model.is_mamba or not MAKERS[figure].needs_mamba]


def with_layer(figure: str, model: CausalLM, settings: Settings) -> Settings:
    """The settings with the bottleneck layer, if the figure needs a layer and none is named."""
    if not MAKERS[figure].takes_layer or settings.layer is not None:
        return settings
    from .experiments import default_layer

    return replace(settings, layer=default_layer(model, seed=settings.seed, progress=settings.progress))
