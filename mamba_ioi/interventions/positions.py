"""Positions that callers give, of all rows or each row's own, each refused in one sentence where it does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..checks import integer, integers, listed


def kept_positions(ids: Int[Tensor, "B L"], positions) -> Int[Tensor, "B k"]:
    """The positions to keep of each row, counted from 0.

    Raises:
        ValueError: for what is neither a position, nor a list of them, nor ``[B, k]`` of each row's own.
    """
    batch, length = ids.shape
    wanted = "positions are an integer, a list of integers, or each row's own as a tensor [B, k]"
    if getattr(positions, "ndim", 0) == 1 and not isinstance(positions, list | tuple):
        raise ValueError(
            f"{wanted}, not a tensor of shape {tuple(positions.shape)}: write positions[:, None] or a list"
        )
    try:
        found = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{wanted}, not {positions!r}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.numel() == 0:
        raise ValueError(f"{wanted}, not {positions!r}")
    if found.dim() < 2:
        found = found.reshape(1, -1).expand(batch, -1)
    if found.dim() != 2 or len(found) != batch:
        raise ValueError(f"{wanted}, here [{batch}, k], not of shape {tuple(found.shape)}")
    outside = (found < (0 if getattr(positions, "ndim", 0) == 2 else -length)) | (found >= length)  # -1 of a row: none
    if outside.any():
        raise ValueError(f"position {int(found[outside][0])} is outside the prompt's {length} positions")
    return (found % length).to(ids.device)


def refuse_padding(last: Int[Tensor, "B"] | None, positions: Int[Tensor, "B k"] | Sequence[int]) -> None:
    """Refuse to read where one of the texts has ended.

    Args:
        last: each text's last position; None where token ids were given.
        positions: those to read, each row's own or common ones.
    """
    if last is None or len(positions) == 0:
        return
    read = torch.as_tensor(positions).cpu()
    beyond = (read if read.dim() == 2 else read[None]) > last[:, None]
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        position = int(read[row, column] if read.dim() == 2 else read[column])
        raise ValueError(f"position {position} is outside text {row}, which has {int(last[row]) + 1} tokens")


def refuse_ends(last: Int[Tensor, "B"] | None, positions: Iterable) -> None:
    """Refuse positions counted from the end of texts that end at different positions.

    Args:
        last: each text's last position; None where token ids were given.
        positions: for each reader and each patch its positions, checked before; None for all.
    """
    if last is None or len(set(last.tolist())) < 2:
        return
    for given in positions:
        common = [] if given is None or getattr(given, "ndim", 0) == 2 else listed(given)
        if negative := [p for p in map(integer, common) if p is not None and p < 0]:
            raise ValueError(
                f"position {negative[0]} counts from the end, and the texts end at different positions: count from 0"
            )


def read_positions(ids: Int[Tensor, "B L"], positions) -> Int[Tensor, "B"] | None:
    """The position to read in each row, or None for all of them."""
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f'positions are None, a LongTensor [B] or "all", not {positions!r}')
        return None
    if positions is None:
        return ids.new_full((ids.shape[0],), ids.shape[1] - 1)
    try:
        positions = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f'positions are None, a LongTensor [B] or "all", not {positions!r}') from None
    if positions.shape != ids.shape[:1] or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions hold one integer a row, [{ids.shape[0]}], not {tuple(positions.shape)}")
    if ((positions < -ids.shape[1]) | (positions >= ids.shape[1])).any():
        raise ValueError(f"positions {positions.tolist()} reach outside the prompt's {ids.shape[1]} positions")
    return (positions % ids.shape[1]).to(ids.device)


def common_positions(given, length: int, name: str = "positions") -> list[int]:
    """Positions of all rows, counted from 0, in the order given.

    Raises:
        ValueError: if there are none, one is outside the prompts, or one is named twice.
    """
    positions = integers(given)
    if not positions or not all(-length <= p < length for p in positions):
        raise ValueError(f"{name} {positions} of a prompt with {length} positions: use 0 to {length - 1}")
    positions = [p % length for p in positions]
    if len(set(positions)) < len(positions):
        raise ValueError(f"{name} {positions} name one position twice")
    return positions


def own_positions(ids: Int[Tensor, "B L"], positions) -> Int[Tensor, "B k"] | None:
    """Each row's own positions, on the CPU, if the positions given are such; None if they are not.

    Raises:
        ValueError: for other rows than the prompts', a position outside the prompts, or one that a row names twice.
    """
    nested = isinstance(positions, list | tuple) and any(isinstance(one, list | tuple) for one in positions)
    if not nested and getattr(positions, "ndim", 0) < 2:
        return None
    wanted = f"each row's own positions are whole numbers of shape [{len(ids)}, k]"
    try:
        found = torch.as_tensor(positions).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{wanted}, not {positions!r:.80}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{wanted}, not {found.dtype}")
    if found.dim() != 2 or len(found) != len(ids) or not found.shape[1]:
        raise ValueError(f"{wanted}, not of shape {tuple(found.shape)}")
    found = found.long()
    outside = (found < -1) | (found >= ids.shape[1])
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of a patch's positions: {int(found[row, column])} is no position of a prompt with "
            f"{ids.shape[1]} positions: use 0 to {ids.shape[1] - 1}, or -1 for none"
        )
    ordered = found.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(f"row {row} of a patch's positions names position {int(ordered[row, column])} twice")
    return found
