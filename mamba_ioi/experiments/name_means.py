"""The mean activation of each name in each slot of the prompt, at the point where the SSM receives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import integer, whole_number
from ..models.model import MambaModel
from ..tasks.ioi import IOIDataset
from ..tasks.names import name_tokens
from .bottleneck import default_layer
from .common import check_layer
from .means import mean_cells

SLOTS = (1, 2, 3, 4, 5)


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
    names = torch.searchsorted(tokens, data.clean_tokens.gather(1, data.name_positions))
    cell, cells = names * len(SLOTS) + torch.arange(len(SLOTS)), len(known) * len(SLOTS)
    at = data.name_positions + int(offset)
    means, counts = mean_cells(model, "ssm_input", layer, data.clean_tokens, at, cell, cells, progress=progress)
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
