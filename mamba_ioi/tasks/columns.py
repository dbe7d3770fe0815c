"""Columns of data, one entry or list a row: taken from tensors, arrays and lists, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def integers(value: Any, name: str, *, dims: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """The value as a LongTensor, copied where it is no tensor; ``dims`` says how many dimensions it may have.

    Raises:
        ValueError: if it is none, holds anything but whole numbers, or has another number of dimensions.
    """
    wanted = " or ".join({1: "[B]", 2: "[B, n]"}[dim] for dim in dims)
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise ValueError(f"{name} holds no numbers: it is a tensor of the meta device")
        tensor = value
    else:
        tensor = _from_sequence(value, name, wanted)
    if tensor.dim() not in dims:
        raise ValueError(f"{name} must be whole numbers of shape {wanted}, not of shape {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        flat = tensor.reshape(len(tensor), -1)
        wrong = flat != flat.real.round() if tensor.dtype != torch.bool else torch.ones_like(flat)
        row, column = (wrong if wrong.any() else torch.ones_like(wrong)).nonzero()[0].tolist()
        raise ValueError(f"row {row} of {name}: {flat[row, column].item()!r} is {tensor.dtype}, and no integer")
    return tensor.to(device, torch.long)


def _from_sequence(value: Any, name: str, wanted: str) -> Tensor:
    refused = f"{name} must be whole numbers of shape {wanted}, not {value!r:.80}"
    if value is None or isinstance(value, str | bytes | Mapping):
        raise ValueError(refused)
    if isinstance(value, list | tuple):
        sizes = [len(row) if hasattr(row, "__len__") and not isinstance(row, str) else None for row in _plain(value)]
        odd = [row for row, size in enumerate(sizes) if size != sizes[0]]
        if odd:
            row = odd[0]
            raise ValueError(
                f"row {row} of {name}: {value[row]!r:.80} is not as long as row 0, {value[0]!r:.80}; "
                f"pad the rows to one length"
            )
        for row, entry in enumerate(_plain(value)):
            for one in entry if isinstance(entry, list | tuple) else [entry]:
                if isinstance(one, bool | np.bool_ | str) or one is None:
                    raise ValueError(f"row {row} of {name}: {one!r} is no whole number")
        value = _plain(value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(refused) from None
    if array.dtype.kind in "iu":
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{name} holds {array.max()}, which is too large for a whole number of 64 bits")
        return torch.tensor(array.astype(np.int64))
    if array.dtype.kind in "fb" or array.size == 0:
        return torch.tensor(array.astype(np.float64) if array.dtype.kind != "b" else array)
    raise ValueError(refused)


def _plain(value: Any) -> Any:
    """Tensors in a list as lists."""
    return [entry.tolist() if isinstance(entry, Tensor) else entry for entry in value]


def check_rows(found: int, rows: int, name: str, of: str) -> None:
    """Refuse a column with more or fewer rows than the data.

    Raises:
        ValueError: if so.
    """
    if found < rows:
        raise ValueError(f"row {found} of {name} is missing: it has {found} rows, {of} has {rows}")
    if found > rows:
        raise ValueError(f"row {rows} of {name} is too much: it has {found} rows, {of} has {rows}")


def refuse(wrong: Bool[Tensor, "B"] | Bool[Tensor, "B n"], value: Tensor, name: str, reason: str) -> None:
    """Refuse the first entry that is wrong, by its row and value.

    Args:
        wrong: which entries are.
        value: the entries.
        name: the field they are of.
        reason: what is wrong, after "row 3 of answers: 99 "; ``{row}`` stands for the row.

    Raises:
        ValueError: if any is.
    """
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"row {place[0]} of {name}: {int(value[tuple(place)])} {reason}"
            + (f" (column {place[1]})" if len(place) > 1 else "")
        )


def check_ids(ids: Tensor, name: str, *, padded: bool = False, size: int | None = None) -> None:
    """Refuse negative token ids, except -1 where ``padded``, and those outside a vocabulary of ``size``.

    Raises:
        ValueError: if there is one.
    """
    also = "; -1 is padding" if padded else ""
    refuse(ids < (-1 if padded else 0), ids, name, f"is no token id, which are 0 or more{also}")
    if size is not None:
        refuse(ids >= size, ids, name, f"is outside the vocabulary, whose tokens are 0 to {size - 1}")


def check_distinct(ids: Int[Tensor, "B n"], name: str) -> None:
    """Refuse a token that a row names twice; negative entries are padding.

    Raises:
        ValueError: if there is one.
    """
    values, _ = ids.sort(dim=1)
    twice = torch.zeros_like(values, dtype=torch.bool)
    twice[:, 1:] = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] >= 0)
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(f"row {row} of {name}: token {int(values[row, column])} is named twice")


def labels(value: Any, name: str, rows: int) -> list:
    """One label a row, a text or a whole number each.

    Raises:
        ValueError: if it is anything else, or of another length.
    """
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} must be a list with one label a row, not {value!r:.80}")
    found = value.tolist() if isinstance(value, Tensor | np.ndarray) else list(value)
    check_rows(len(found), rows, name, "clean_tokens")
    found = [entry.item() if isinstance(entry, np.generic | Tensor) else entry for entry in found]
    for row, label in enumerate(found):
        if not isinstance(label, str | int):
            raise ValueError(f"row {row} of {name}: a label is a text or a whole number, not {label!r:.80}")
    return [str(label) if isinstance(label, str) else label for label in found]


def texts(value: Any, name: str, rows: int) -> list[str]:
    """One text a row.

    Raises:
        ValueError: if it is anything else, or of another length.
    """
    found = labels(value, name, rows)
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"row {row} of {name}: {text!r} is no text")
    return found
