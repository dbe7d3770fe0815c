"""The mean activation of each name in each slot of the prompt, at the point where the SSM receives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import integer, whole_number
from ..interventions.run import cache
from ..memory import fitting_rows, forward_bytes
from ..models.model import MambaModel
from ..remote.requests import ask
from ..tasks.ioi import IOIDataset
from ..tasks.names import name_tokens
from .bottleneck import default_layer
from .common import check_layer

SLOTS = (1, 2, 3, 4, 5)
MOST_ROWS = 128
ROWS_IN_A_REQUEST = 4096


@dataclass(frozen=True, eq=False)
class NameMeans:
    """The mean ``ssm_input`` of each name in each of the five slots.

    Attributes:
        layer: of which layer.
        offset: how many positions after the name it was read.
        n_pairs: pairs it was taken over, in both directions.
        seed: of the pairs.
        names: the names, without a space in front.
        tokens: their token ids, ascending, ``[names]``.
        means: ``[names, 5, E]``, float32; zeros where there is no value.
        counts: how many values each mean is over, ``[names, 5]``.
    """

    layer: int
    offset: int
    n_pairs: int
    seed: int
    names: tuple[str, ...]
    tokens: Int[Tensor, "M"]
    means: Float[Tensor, "M 5 E"]
    counts: Int[Tensor, "M 5"]

    def index(self, tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Where the names with these token ids stand in ``names``."""
        return torch.searchsorted(self.tokens, tokens.contiguous())


def name_means(
    model: MambaModel,
    layer: int | None = None,
    n_pairs: int = 10_000,
    *,
    seed: int = 27,
    offset: int = 1,
    progress: bool = True,
) -> NameMeans:
    """The mean ``ssm_input`` at ``offset`` after each name, by name and slot, over the prompts of all templates.

    One pass; beside the prompts' tokens, memory does not grow with ``n_pairs``.

    Args:
        model: a Mamba with a tokenizer.
        layer: the layer; the model's bottleneck on a few pairs drawn with ``seed`` if None.
        n_pairs: pairs to draw; both prompts of each are used (the paper has 50 to 100 values a name and slot).
        seed: of the pairs.
        offset: how far after its token a name reaches the SSM: 1 in mamba-370m, whose layer 39 takes names from conv
            slice -1; a layer that takes them from slice s needs offset -s.
        progress: show a bar.

    Raises:
        ValueError: if the model is no Mamba or has no tokenizer, a layer is not there, the offset is not from 0 to
            d_conv - 1, the prompts cannot be drawn, or the model carries edits or hooks.
    """
    check_names(model, offset)
    model.require_stream("name means")
    n_pairs, seed = whole_number(n_pairs, "n_pairs", least=1), whole_number(seed, "seed", least=0)
    layer = default_layer(model, seed=seed, progress=progress) if layer is None else check_layer(model, layer)
    known = sorted(name_tokens(model.tokenizer).items(), key=lambda item: item[1])
    tokens = torch.tensor([token for _, token in known])
    data = mean_prompts(model, n_pairs, seed)
    cells = len(known) * len(SLOTS)
    sums = torch.zeros(cells, model.d_inner, dtype=torch.float64)
    counts = torch.zeros(cells, dtype=torch.long)
    with tqdm(total=len(data), desc=f"mean ssm_input of layer {layer}", disable=not progress) as bar:
        at_once = rows_at_once(model, data)
        for rows in torch.arange(len(data)).split(at_once if model.remote is None else ROWS_IN_A_REQUEST):
            prompts, at = data.clean_tokens[rows], data.name_positions[rows]
            names = torch.searchsorted(tokens, prompts.gather(1, at))
            cell = names * len(SLOTS) + torch.arange(len(SLOTS))
            sums += ask(model, name_sums, layer, prompts, at + int(offset), cell, cells, aside=(at_once,))["sums"].cpu()
            counts += torch.bincount(cell.flatten(), minlength=cells)
            bar.update(len(rows))
    means = (sums / counts.clamp(min=1)[:, None]).float()
    return NameMeans(
        layer=layer,
        offset=int(offset),
        n_pairs=n_pairs,
        seed=seed,
        names=tuple(name for name, _ in known),
        tokens=tokens,
        means=means.unflatten(0, (len(known), len(SLOTS))),
        counts=counts.unflatten(0, (len(known), len(SLOTS))),
    )


def mean_prompts(model: MambaModel, n_pairs: int, seed: int) -> IOIDataset:
    """The prompts that means are taken over: both of each pair, of all templates, each once the clean one of a row."""
    return IOIDataset.generate(model.tokenizer, n_pairs, seed=seed, templates="all")


def rows_at_once(model: MambaModel, data: IOIDataset) -> int:
    """How many prompts to run at once."""
    return fitting_rows(model, forward_bytes(model, data.clean_tokens.shape[1]), MOST_ROWS)


def name_sums(
    model: MambaModel,
    layer: int,
    tokens: Int[Tensor, "B L"],
    at: Int[Tensor, "B 5"],
    cell: Int[Tensor, "B 5"],
    cells: int,
    most: int,
) -> dict[str, Float[Tensor, "cells E"]]:
    """``sums``: of ``ssm_input`` at five positions of each prompt, each added to its cell; here or on a server."""
    sums = torch.zeros(cells, model.d_inner, dtype=torch.float64)
    for rows in torch.arange(len(tokens)).split(most):
        values = cache(model, tokens[rows], [("ssm_input", layer)])["ssm_input", layer].cpu()
        values = values.gather(1, at[rows, :, None].expand(-1, -1, values.shape[-1])).double()
        sums.index_add_(0, cell[rows].flatten(), values.flatten(0, 1))
    return {"sums": sums}


def check_names(model: MambaModel, offset: int) -> None:
    """Refuse a model without names to represent, and an offset that the conv does not reach.

    Raises:
        ValueError: if the model is no Mamba or has no tokenizer, or the offset is not from 0 to d_conv - 1.
    """
    model.require_mamba("name representations")
    if model.tokenizer is None:
        raise ValueError(f"{model.model_id} has no tokenizer, which is needed to draw prompts")
    if integer(offset) not in range(model.d_conv):
        raise ValueError(f"offset is a whole number from 0 to {model.d_conv - 1}, the conv's reach, not {offset!r}")
