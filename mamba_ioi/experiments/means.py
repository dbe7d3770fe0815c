"""Means of a site at one place of the prompts, by group or by token: what steering vectors are differences of."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..interventions.patch import resolve
from ..interventions.run import cache
from ..memory import fitting_rows, forward_bytes
from ..models.model import CausalLM
from ..remote.requests import ask
from ..tasks.pairs import PromptPairs
from .common import check_data, positions_at, tokens_at

MOST_ROWS = 128
ROWS_IN_A_REQUEST = 4096
ALL = "all"
"""The label of all rows, where nothing tells them apart."""


@dataclass(frozen=True, eq=False)
class Means:
    """The mean of a site at one place, for each label: ``found["a"] - found["b"]`` is a steering vector.

    Attributes:
        site: of which site.
        layer: of which layer.
        labels: what rows are told apart by: a group's labels, or the texts of tokens (``" Mary"``; their ids where
            there is no tokenizer); ``("all",)`` where nothing is.
        tokens: the tokens' ids, ``[G]``, ascending; None where labels are a group's.
        values: the means, ``[G, *site]``, float32 on the CPU.
        counts: how many rows each is over, ``[G]``, at least one.
    """

    site: str
    layer: int
    labels: tuple[Hashable, ...]
    tokens: Int[Tensor, "G"] | None
    values: Float[Tensor, "G *site"]
    counts: Int[Tensor, "G"]

    def __getitem__(self, label: Hashable) -> Float[Tensor, "*site"]:
        """The mean of one label.

        Raises:
            ValueError: if no row has it.
        """
        if label not in self.labels:
            known = ", ".join(map(repr, self.labels[:8])) + (", ..." if len(self.labels) > 8 else "")
            raise ValueError(f"there is no mean of {label!r}; there are those of {known}")
        return self.values[self.labels.index(label)]

    def of(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B *site"]:
        """The mean of each row's own token, such as ``found.of(pairs.answers)``.

        Raises:
            ValueError: if labels are no tokens, or there is no mean of one of them.
        """
        if self.tokens is None:
            raise ValueError("these means are by the labels of a group, not by token")
        tokens = torch.as_tensor(tokens).cpu()
        at = torch.searchsorted(self.tokens, tokens.contiguous()).clamp(max=len(self.tokens) - 1)
        if (missing := tokens[self.tokens[at] != tokens]).numel():
            raise ValueError(f"there is no mean of token {int(missing[0])}: no row has it there")
        return self.values[at]


def means(
    model: CausalLM,
    pairs: PromptPairs,
    site: str,
    layer: int,
    mark: str | int,
    *,
    by: str | None = None,
    prompts: Literal["clean", "corrupt"] = "clean",
    progress: bool = True,
) -> Means:
    """The mean of a site at a mark of the prompts, for each label of a group, or for each token at another mark.

    Differences of means are steering vectors (arXiv 2312.06681; the paper's Section 4.3 writes names so): they are
    added in a run, a sweep or a generation by ``Patch(site, layer, vector, positions, add=True)``.

    Args:
        model: any causal language model.
        pairs: pairs of prompts.
        site: a site of a layer that has positions.
        layer: the layer.
        mark: where it is read: a mark of the data (``"n1+1"``, ``"last"``), or a position of all rows.
        by: what tells rows apart: a group of the data; or a mark, by the token that stands there; or ``"answer"``, by
            the answer. None: all rows together.
        prompts: of each pair, which prompt is read. The difference of the two is that of ``prompts="clean"`` and
            ``prompts="corrupt"``.
        progress: show a bar.

    Returns:
        The means, and over how many rows each is. Rows without the mark are left out. Memory does not grow with the
        number of pairs.

    Raises:
        ValueError: for an unknown site, layer, mark or group, a site without positions, answers that are sets, no row
            that has the mark, or a model that carries edits or hooks.
    """
    check_data(model, pairs)
    model.require_stream("means")
    ref = resolve(model, site, layer)
    if ref.position is not None or ref.layer is None or not ref.site.by_position:
        raise ValueError(f"means are of a layer's site at a mark, and {site!r} is none that has positions")
    if prompts not in ("clean", "corrupt"):
        raise ValueError(f"prompts are 'clean' or 'corrupt', not {prompts!r}")
    at = positions_at(pairs, [mark])
    ids, labels, known = _cells(model, pairs, by, prompts)
    cell = known.where(at[:, 0] >= 0, -1)
    seen = cell[cell >= 0].unique()
    if not len(seen):
        raise ValueError(f"no row has the mark {mark!r}" + ("" if by is None else f" and a {by!r}"))
    cell = torch.searchsorted(seen, cell).where(cell >= 0, -1)
    tokens = pairs.clean_tokens if prompts == "clean" else pairs.corrupt_tokens
    found, counts = mean_cells(model, ref.site.name, ref.layer, tokens, at, cell[:, None], len(seen), progress=progress)
    return Means(
        site=ref.site.name,
        layer=ref.layer,
        labels=tuple(labels[index] for index in seen.tolist()),
        tokens=None if ids is None else ids[seen],
        values=found,
        counts=counts,
    )


def _cells(
    model: CausalLM, pairs: PromptPairs, by: str | None, prompts: Literal["clean", "corrupt"]
) -> tuple[Int[Tensor, "G"] | None, list, Int[Tensor, "B"]]:
    """The tokens that tell rows apart (None: no tokens do), their labels, and each row's place there, -1 for none."""
    if by is None:
        return None, [ALL], torch.zeros(len(pairs), dtype=torch.long)
    if by in pairs.groups:
        labels = pairs.labels_of(by)
        places = {label: index for index, label in enumerate(labels)}
        return None, labels, torch.tensor([places[label] for label in pairs.groups[by]])
    try:
        own = tokens_at(pairs, by, prompts)
    except ValueError as error:
        groups = ", ".join(map(repr, pairs.groups)) or "none"
        raise ValueError(f"by is a group or a mark: {error}; groups are {groups}") from None
    ids = own[own >= 0].unique()
    texts = ids.tolist() if model.tokenizer is None else [model.tokenizer.decode([one]) for one in ids.tolist()]
    return ids, texts, torch.searchsorted(ids, own.contiguous()).where(own >= 0, -1)


def mean_cells(
    model: CausalLM,
    site: str,
    layer: int,
    tokens: Int[Tensor, "B L"],
    at: Int[Tensor, "B k"],
    cell: Int[Tensor, "B k"],
    cells: int,
    *,
    progress: bool = True,
) -> tuple[Float[Tensor, "cells *site"], Int[Tensor, "cells"]]:
    """The mean of a site over all places that belong to one cell, for each cell, in one pass over the prompts.

    Args:
        model: the model.
        site: the site.
        layer: its layer.
        tokens: the prompts.
        at: positions of each row.
        cell: to which cell each belongs, -1 for none.
        cells: how many there are.
        progress: show a bar.

    Returns:
        The means, in float32 on the CPU, zeros in a cell without a value; and how many values each is over.
    """
    sums: Tensor | float = 0.0
    with tqdm(total=len(tokens), desc=f"mean {site} of layer {layer}", disable=not progress) as bar:
        most = fitting_rows(model, forward_bytes(model, tokens.shape[1]), MOST_ROWS)
        for rows in torch.arange(len(tokens)).split(most if model.remote is None else ROWS_IN_A_REQUEST):
            given = site, layer, tokens[rows], at[rows], cell[rows], cells
            sums = sums + ask(model, cell_sums, *given, aside=(most,))["sums"].cpu()
            bar.update(len(rows))
    assert isinstance(sums, Tensor)  # there is at least one row
    counts = torch.bincount(cell[cell >= 0], minlength=cells)
    return (sums / counts.clamp(min=1).reshape(-1, *[1] * (sums.dim() - 1))).float(), counts


def cell_sums(
    model: CausalLM,
    site: str,
    layer: int,
    tokens: Int[Tensor, "B L"],
    at: Int[Tensor, "B k"],
    cell: Int[Tensor, "B k"],
    cells: int,
    most: int,
) -> dict[str, Float[Tensor, "cells *site"]]:
    """``sums`` of a site at some positions of each prompt, each added to its cell; here or on a server."""
    sums: Tensor | float = 0.0
    for rows in torch.arange(len(tokens)).split(most):
        found = cache(model, tokens[rows], [(site, layer)], positions=at[rows].clamp(min=0))[site, layer]
        values, own = found.cpu().double().flatten(0, 1), cell[rows].flatten()
        some = values.new_zeros(cells, *values.shape[1:]).index_add_(0, own[own >= 0], values[own >= 0])
        sums = sums + some
    assert isinstance(sums, Tensor)  # there is at least one row
    return {"sums": sums}
