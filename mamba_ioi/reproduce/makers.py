"""From a row of the catalogue to its result: what it is asked for with, the model, the layer, the computation.

Nothing here imports torch before something is to be computed, so that refusals come at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from ..catalogue import CATALOGUE, Row
from ..zoo import DICTIONARIES
from .source import Source

if TYPE_CHECKING:
    from ..models.model import CausalLM
    from ..result import Result
    from ..tasks import PromptPairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a figure is asked for with.

    Attributes:
        model: as for `load_model`.
        pairs: how many pairs, instead of each figure's own number.
        seed: of the prompts.
        layer: the layer to look at where one is needed, instead of the bottleneck.
        channels: of a Mamba-2's conv, those that are resampled where taps are; None for all.
        source: where the pairs of another task come from; None for the paper's.
        marks: with a source, the places to go by instead of positions.
        metric: with a source, what is measured instead of the pairs' own metric.
        device: where to compute; the CPU unless given.
        dtype: the precision of the weights, instead of the checkpoint's.
        remote: the NDIF server to run on, as for `load_model`.
        memory: how many bytes to use, about, instead of half of what is free.
        budget: how many seconds the figures may take together, about: pairs, and figures if it must be, are chosen so.
        progress: show bars.
    """

    model: str = "tiny"
    pairs: int | None = None
    seed: int = 27
    layer: int | None = None
    channels: str | None = None
    source: Source | None = None
    marks: Sequence[str] | None = None
    metric: str | None = None
    device: str | None = None
    dtype: str | None = None
    remote: bool | str = False
    memory: int | None = None
    budget: float | None = None
    progress: bool = False


@dataclass(frozen=True)
class Given:
    """Pairs of another task than the paper's, as a model's figures get them.

    Attributes:
        data: the pairs.
        held_out: others, to judge on; None if there are none.
        marks: the places to go by; None for common positions.
    """

    data: PromptPairs
    held_out: PromptPairs | None
    marks: list[str] | None


def make(row: Row, model: CausalLM, settings: Settings, given: Given | None = None) -> Result:
    """The result of a figure; of mamba-370m's circuits with their agreement with the authors' edges in ``meta``.

    Args:
        row: the figure's row of the catalogue.
        model: the model.
        settings: what is asked for.
        given: the pairs of the settings' source, if there is one.

    Raises:
        ValueError: as the figure's function.
    """
    from ..experiments import Experiment
    from ..result import Result

    chosen: dict[str, Any] = {"layer": settings.layer} if row.takes_layer else {}
    chosen |= {"channels": settings.channels} if row.takes_channels else {}
    experiment = Experiment(**vars(row))
    if given is None or settings.source is None:
        result = experiment(model, pairs=settings.pairs, seed=settings.seed, progress=settings.progress, **chosen)
        return _beside_the_paper(result, model.model_id)
    marks = given.marks if _takes_marks(row) else None
    with settings.source.named():
        result = experiment(
            model, given.data, held_out=given.held_out, marks=marks, progress=settings.progress, **chosen
        )
    return Result(result.table, result.meta | settings.source.told() | {"rows": len(given.data)})


def _takes_marks(row: Row) -> bool:
    """Whether a figure's function can go by marks."""
    function = resolve_name(row.function) if isinstance(row.function, str) else row.function
    return "marks" in signature(function).parameters


def architecture(model: CausalLM) -> Result:
    """Figure 2: the sizes of a Mamba, columns size and value."""
    return _sizes("architecture", model)


def ssm_internals(model: CausalLM) -> Result:
    """Figure 12: likewise."""
    return _sizes("ssm_internals", model)


def _sizes(name: str, model: CausalLM) -> Result:
    from ..figures import ModelSizes
    from ..result import Result

    return Result.create(name, ModelSizes.of(model).table(), model=model, arguments={})


def residual_graph(model: CausalLM) -> Result:
    """Figure 3: every edge of the residual stream, columns src and dst; of the first layers where there are many."""
    from ..figures import residual_edges
    from ..result import Result

    shown = model.n_layers if model.n_layers <= 8 else 4
    return Result.create("residual_graph", residual_edges(shown), model=model, arguments={"layers_shown": shown})


def _beside_the_paper(result: Result, model_id: str) -> Result:
    """The result, of mamba-370m with its agreement with the authors' edges in ``meta["paper"]``, and in the log."""
    from .. import reference
    from ..circuits.pipeline import circuit_of
    from ..result import Result

    if "circuit" not in result.meta or not reference.is_paper_model(model_id):
        return result
    tables = [reference.compare_circuit(circuit_of(result))]
    if result.meta["experiment"] == "edge_matrices":
        tables.append(reference.compare_scores(result))
    for table in tables:
        logger.warning("compared with the authors' circuit of mamba-370m:\n%s", table.to_string(index=False))
    paper = [table.astype(object).where(table.notna(), None).to_dict("records") for table in tables]
    return Result(result.table, result.meta | {"paper": paper})


def prepare(settings: Settings, figures: Sequence[str]) -> tuple[CausalLM, Given | None]:
    """The model, and the pairs of another task; what would fail in every figure is refused here.

    Raises:
        ValueError: for a model that cannot be loaded, a layer or channels that it does not have, or a tokenizer
            without names; for a file or a row of it that is not as it should be, a mark that it lacks, or an unknown
            metric or task.
    """
    from ..experiments.common import check_layer
    from ..interventions.patch import some_channels
    from ..models.model import load_model
    from ..tasks import generate

    model = load_model(settings.model, device=settings.device, dtype=settings.dtype, remote=settings.remote)
    model.memory = settings.memory
    if settings.layer is not None:
        check_layer(model, settings.layer)
    if settings.channels is not None:
        model.require_mamba("channels of a conv")
        some_channels(model, model.known_sites()["conv_slice"], settings.channels)
    if settings.source is not None:
        return model, given_pairs(model, settings, figures)
    if any(CATALOGUE[figure].draws for figure in figures):
        if model.tokenizer is None:
            raise ValueError(f"{settings.model} has no tokenizer, which is needed to draw prompts")
        generate("ioi", model.tokenizer, 1, seed=settings.seed, templates="all")
    return model, None


def given_pairs(model: CausalLM, settings: Settings, figures: Sequence[str]) -> Given:
    """The pairs of the settings' source, checked for what all figures ask of them.

    Without marks that are asked for, rows that differ in positions go by all marks that they have.

    Raises:
        ValueError: as `prepare`.
        OSError: if the file cannot be read.
    """
    from ..experiments.common import check_data, check_places, rows_by_group

    source = settings.source
    assert source is not None
    more = source.held_out()
    data, held_out = source.pairs(model), None if more is None else more.pairs(model)
    if settings.metric is not None:
        data = replace(data, metric=settings.metric)
        held_out = None if held_out is None else replace(held_out, metric=settings.metric)
    with source.named():
        aligned = check_data(model, data) is not None
        by_group = [CATALOGUE[figure] for figure in figures if "corruption" in CATALOGUE[figure].columns]
        taken = {column for row in by_group for column in (*row.columns, "mark")} - {"corruption", "template"}
        rows_by_group(data, sorted(taken))
        marks = None if settings.marks is None else check_places(data, None, settings.marks)
    if marks is None and not aligned and data.marks:
        marks = [*data.marks, "last"]
    return Given(data, held_out, None if marks is None else list(map(str, marks)))


def unavailable(figure: str, settings: Settings) -> str | None:
    """Why a figure cannot be made, as far as it is known without the model; None if that does not stand in the way."""
    if CATALOGUE[figure].needs_dictionary and settings.model not in DICTIONARIES:
        return f"no dictionary of features ships for {settings.model}"
    return CATALOGUE[figure].lacks


def unfit(figure: str, model: CausalLM, given: Given | None) -> str | None:
    """Why the model or the pairs cannot have a figure; None if they can."""
    row = CATALOGUE[figure]
    if row.needs_mamba and not model.has_scans:
        return f"{model.model_id} is no Mamba"
    if row.needs_alignment and given is not None and given.data.position_labels is None:
        by_marks = _takes_marks(row)
        if not by_marks:
            return "it needs rows whose marks and last token stand at the same positions"
        if given.marks is None:
            return "the rows' last tokens stand at different positions, and there are no marks to go by"
    return None


def bottleneck(model: CausalLM, settings: Settings, given: Given | None) -> Result:
    """Which layer is the bottleneck, on the given pairs or on a few of the paper's; see `experiments.bottleneck`."""
    from ..experiments.bottleneck import default_pairs, whole_layer_effects
    from ..result import Result

    data = default_pairs(model, settings.seed) if given is None else given.data  # pyright: ignore[reportArgumentType]
    result = whole_layer_effects(model, data, progress=settings.progress)  # pyright: ignore[reportArgumentType]
    seed: dict[str, Any] = {"seed": settings.seed} if given is None else {}
    return Result(result.table, result.meta | seed)


def with_layer(figure: str, model: CausalLM, settings: Settings, given: Given | None) -> Settings:
    """The settings with the bottleneck layer, if the figure needs a layer and none is named."""
    if not CATALOGUE[figure].takes_layer or settings.layer is not None:
        return settings
    return replace(settings, layer=bottleneck(model, settings, given).meta["arguments"]["layer"])
