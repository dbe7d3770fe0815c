"""From a row of the catalogue to its result: what it is asked for with, the model, the layer, the computation.

Nothing here imports torch before something is to be computed, so that refusals come at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..catalogue import CATALOGUE, Row

if TYPE_CHECKING:
    from ..models.model import CausalLM
    from ..result import Result

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


def make(row: Row, model: CausalLM, settings: Settings) -> Result:
    """The result of a figure; of mamba-370m's circuits with their agreement with the authors' edges in ``meta``.

    Raises:
        ValueError: as the figure's function.
    """
    from ..experiments import Experiment

    layer = settings.layer if row.takes_layer else None
    experiment = Experiment(**vars(row))
    result = experiment(model, pairs=settings.pairs, seed=settings.seed, layer=layer, progress=settings.progress)
    return _beside_the_paper(result, model.model_id)


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


def prepare(settings: Settings, figures: Sequence[str]) -> tuple[CausalLM, list[str]]:
    """The model, and which of the figures it can have; what would fail in every one of them is refused here.

    Raises:
        ValueError: for a model that cannot be loaded, a layer that it does not have, or a tokenizer without names.
    """
    from ..experiments.common import check_layer
    from ..models.model import load_model
    from ..tasks import generate

    model = load_model(settings.model, device=settings.device, dtype=settings.dtype, remote=settings.remote)
    model.memory = settings.memory
    if settings.layer is not None:
        check_layer(model, settings.layer)
    if any(CATALOGUE[figure].draws for figure in figures):
        if model.tokenizer is None:
            raise ValueError(f"{settings.model} has no tokenizer, which is needed to draw prompts")
        generate("ioi", model.tokenizer, 1, seed=settings.seed, templates="all")
    return model, [figure for figure in figures if model.has_scans or not CATALOGUE[figure].needs_mamba]


def with_layer(figure: str, model: CausalLM, settings: Settings) -> Settings:
    """The settings with the bottleneck layer, if the figure needs a layer and none is named."""
    if not CATALOGUE[figure].takes_layer or settings.layer is not None:
        return settings
    from ..experiments import default_layer

    return replace(settings, layer=default_layer(model, seed=settings.seed, progress=settings.progress))
