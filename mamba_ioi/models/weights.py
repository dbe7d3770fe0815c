"""The tensors in a checkpoint's files, and whether a model holds exactly these."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The precisions that a model may have."""
_STORED = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_CONSTANTS = re.compile(r"(masked_bias|\.(attn|attention)\.bias|rotary_emb\.inv_freq|position_ids)$")
"""Tables that older releases of transformers saved with the weights, and newer ones compute."""


def weight_files(source: str, revision: str | None, named: str | None = None) -> list[Path]:
    """The files that hold a checkpoint's weights, in the order in which transformers prefers them; none if it has none.

    Args:
        source: a directory or a Hub id.
        revision: the Hub revision.
        named: the file that its config names, if it does.

    Raises:
        ValueError: for an index that cannot be read or names a file that is not there.
    """
    for name in _FILES if named is None else (named,):
        path = _file(source, revision, name)
        if path is None:
            continue
        if not name.endswith(".index.json"):
            return [path]
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            shards = []
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError(f"{name} has no weight_map from the names of tensors to files")
        paths = {shard: _file(source, revision, shard) for shard in shards}
        for shard, found in paths.items():
            if found is None:
                raise ValueError(f"{name} names {shard}, which is not there")
        return [found for found in paths.values() if found is not None]
    return []


def _file(source: str, revision: str | None, name: str) -> Path | None:
    path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the files with its name, one after the other. A pickle is read for its tensors alone.

    Raises:
        ValueError: for a file that cannot be read, or that holds something else.
    """
    for path in files:
        try:
            yield from _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
        except _Unreadable as error:
            raise ValueError(f"{path.name} {error}") from error
        except Exception as error:
            raise ValueError(f"{path.name} cannot be read: {one_line(error)}") from error


class _Unreadable(Exception):
    """What is wrong with a file."""


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            yield key, file.get_tensor(key)


def _pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(held, Mapping):
        raise _Unreadable(f"holds a {type(held).__name__}, not tensors by their names")
    for key, tensor in held.items():
        if not isinstance(tensor, Tensor):
            raise _Unreadable(f"holds a {type(tensor).__name__} as {key!r}, not a tensor")
        yield key, tensor


def widest_dtype(files: Iterable[Path], given: torch.dtype | None = None) -> torch.dtype | None:
    """The precision that holds every tensor in the files without rounding, and no less than ``given``, if that is one.

    Raises:
        ValueError: as `tensors`.
    """
    found = {given}
    for path in files:
        if path.suffix != ".safetensors":
            found |= {tensor.dtype for _, tensor in tensors([path])}
            continue
        try:  # the header alone
            with safe_open(path, "pt") as file:
                found |= {_STORED.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{path.name} cannot be read: {one_line(error)}") from error
    known = [dtype for dtype in DTYPES if dtype in found]
    return reduce(torch.promote_types, known) if known else None


def refuse_other_values(module: nn.Module, files: Sequence[Path]) -> None:
    """Refuse a model that does not hold the files' tensors, value for value, in its own precision.

    What transformers puts together from several tensors, and what its class leaves out on purpose, is not compared.

    Raises:
        ValueError: naming the tensor that is missing, holds NaN or infinite values, has values beyond the model's
            precision, or is another one in the model.
    """
    held = module.state_dict()
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    made = _put_together(module)
    found = set()
    for key, tensor in tensors(files):
        names = (key, prefix + key, key.removeprefix(prefix), hf_name(key))
        name = next((name for name in names if name in held), None)
        if name is None or any(pattern.search(key) for pattern in made):
            continue
        here = held[name].cpu()
        found.add(held[name].data_ptr())
        if here.is_floating_point() and not tensor.is_floating_point():
            raise ValueError(
                f"{key} in its weights is of {dtype_name(tensor.dtype)}, which is no floating-point number"
            )
        refuse_not_finite(key, tensor, here.dtype)
        if tensor.shape != here.shape or not torch.equal(tensor.to(here.dtype), here):
            tied = [
                other for other, value in held.items() if other != name and value.data_ptr() == held[name].data_ptr()
            ]
            why = f", where it is tied to {tied[0]}" if tied else ""
            raise ValueError(f"{key} in its weights is not {name} in the model{why}")
    for name, parameter in module.named_parameters():
        if parameter.data_ptr() not in found and not getattr(module, "_weight_conversions", ()):
            raise ValueError(f"its weights lack {name}")
        if not parameter.isfinite().all():
            raise ValueError(f"its weights are not finite: {name} holds NaN or infinite values")


def refuse_not_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor that holds NaN or infinite values, or comes to hold them in this precision.

    Raises:
        ValueError: naming the tensor, and the precisions that hold its values.
    """
    beyond = ~tensor.to(dtype).isfinite()
    if not beyond.any():
        return
    if not tensor.isfinite().all():
        raise ValueError(f"its weights are not finite: {name} holds NaN or infinite values")
    held_by = [dtype_name(other) for other in DTYPES if tensor.to(other).isfinite().all()]
    raise ValueError(
        f"{dtype_name(dtype)} cannot hold {float(tensor[beyond].flatten()[0]):g}, a value of {name}; "
        f"load it with the dtype {' or '.join(held_by)}"
    )


def hf_name(key: str) -> str:
    """The name in transformers of a tensor of the original state-spaces layout."""
    return key.replace("backbone.embedding.", "backbone.embeddings.")


def dtype_name(dtype: torch.dtype) -> str:
    """The precision's name without its module: ``float16``."""
    return str(dtype).removeprefix("torch.")


def refuse_keys(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights that lack tensors, or hold some that the model has no place for.

    Raises:
        ValueError: naming the first of them.
    """
    missing = list(missing)
    unexpected = [key for key in unexpected if not _CONSTANTS.search(key)]
    if missing:
        raise ValueError(f"its weights lack {some(missing)}")
    if unexpected:
        raise ValueError(f"its weights hold {some(unexpected)}, which its config has no place for")


def refuse_shape(key: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: naming it and both shapes.
    """
    if tuple(found) != tuple(wanted):
        raise ValueError(f"{key} has the shape {tuple(found)}, and its config asks for {tuple(wanted)}")


def some(keys: Iterable[str]) -> str:
    """The first of the keys, and how many more there are."""
    keys = sorted(keys)
    return f"{keys[0]}" if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _put_together(module: nn.Module) -> list[re.Pattern[str]]:
    """Patterns of the tensors that transformers made others from, such as a layer's experts."""
    conversions = [one for one in getattr(module, "_weight_conversions", ()) if getattr(one, "operations", None)]
    return [re.compile(pattern.replace("*", ".*")) for one in conversions for pattern in one.source_patterns]


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters: its first, and the next where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])[:300]
