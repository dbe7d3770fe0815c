"""Activations of more prompts than fit into memory: batch after batch, or into a folder that is memory-mapped again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import whole_number
from ..files import locked, replace_files
from ..tasks.pairs import PromptPairs, check_fit
from ..trace.touched import refuse_touched
from .patch import resolve
from .run import Reading, Tokens, full_name

if TYPE_CHECKING:
    from ..models.model import MambaModel

Positions = int | Sequence[int] | Int[Tensor, "B k"] | None

FORMAT_VERSION = 1
META_FILE = "meta.json"
_SHARD = re.compile(r"rows-(\d{9})-(\d{9})\.safetensors")


def activations(
    model: MambaModel,
    tokens_or_pairs: Tokens | PromptPairs,
    site: str,
    layer: int | None,
    *,
    positions: Positions = None,
    batch_rows: int | None = None,
) -> Iterator[Float[Tensor, "rows *site"]]:
    """One site's activations, some rows at a time: what `cache` gives, for more prompts than fit into memory.

    Args:
        model: a model from `load_model`.
        tokens_or_pairs: as `cache` takes prompts; of pairs, their clean prompts.
        site: a site's name, or an alias.
        layer: its layer; None for ``embed``, ``norm`` and ``logits``, or where the alias names it.
        positions: which positions to keep; see `cache`.
        batch_rows: how many rows run at once; None for as many as ``model.memory`` allows.

    Returns:
        An iterator over tensors ``[rows, L, ...]``, in the order of the rows; each batch runs when it is asked for.

    Raises:
        ValueError: as `cache`, before anything runs; for a site that has no rows, such as ``A``.
    """
    reading = _reading(model, tokens_or_pairs, [resolve(model, site, layer).key], positions)
    key = reading.plan.reads[0].key
    return (reading.read(part)[key] for part in reading.parts(batch_rows))


def cache_to(
    folder: str | os.PathLike[str],
    model: MambaModel,
    tokens_or_pairs: Tokens | PromptPairs,
    sites: Iterable[str | tuple[str, int]],
    *,
    positions: Positions = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> StoredCache:
    """Write what `cache` gives into a folder, batch after batch, and open it.

    Each batch is a safetensors file, which has its name once it is complete: a run that was killed goes on with the
    first row that is missing, in batches of any size, and one that is complete is opened as it is.

    Args:
        folder: where to write; made if absent.
        model: a model from `load_model`.
        tokens_or_pairs: as `cache` takes prompts; of pairs, their clean prompts.
        sites: as `cache` takes sites, but for those that have no rows, such as ``A``.
        positions: which positions to keep; see `cache`.
        batch_rows: how many rows run at once, and stand in one file; None for as many as ``model.memory`` allows.
        progress: show a bar.

    Raises:
        ValueError: as `cache`; if the folder holds activations of another run, or another run is writing there; for a
            model that carries edits or hooks, of which a folder could not tell.
        OSError: if it cannot be written.
    """
    from safetensors.torch import save_file

    refuse_touched(model, "stored activations")
    reading = _reading(model, tokens_or_pairs, sites, positions)
    if batch_rows is not None:
        batch_rows = whole_number(batch_rows, "batch_rows", least=1)
    identity, count = _identity(reading), len(reading.ids)
    folder = Path(os.path.expanduser(folder))
    with locked(folder):
        if (folder / META_FILE).is_file():
            _refuse_another(folder, _read_meta(folder)["run"], identity)
        elif other := sorted(one.name for one in folder.iterdir() if _SHARD.fullmatch(one.name)):
            raise ValueError(f"{folder} holds {other[0]}, and no {META_FILE} that says of which run it is")
        else:
            meta = {"format_version": FORMAT_VERSION, "run": identity}
            replace_files(folder, {META_FILE: (json.dumps(meta, indent=2) + "\n").encode()})
        for left in folder.glob(".rows-*.part"):  # of a run that was killed
            left.unlink()
        done = max((stop for _, stop, _ in _shards(folder)), default=0)
        with tqdm(total=count, initial=done, desc=folder.name, unit="row", disable=not progress) as bar:
            for part in reading.parts(batch_rows, done):
                values = {key: value.cpu().contiguous() for key, value in reading.read(part).items()}
                name = f"rows-{part.start:09d}-{part.stop:09d}.safetensors"
                partial = folder / f".{name}.part"
                save_file(values, partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, folder / name)
                bar.update(part.stop - part.start)
    return StoredCache(folder)


class StoredCache(Mapping[Any, Tensor]):
    """The activations in a folder that `cache_to` has written, read from its memory-mapped files.

    ``stored["h", 39]`` and ``stored["blocks.39.hook_h"]`` are a site's whole value, ``[B, L, ...]``, as in what `cache`
    returns; `rows` and `batches` read some of it.

    Args:
        folder: the folder.

    Raises:
        ValueError: if it is no such folder, or rows are missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.run: dict[str, Any] = _read_meta(self.folder)["run"]
        self.n_rows: int = self.run["rows"]
        self._files = _shards(self.folder)
        stored = self._files[-1][1] if self._files else 0
        if stored != self.n_rows:
            raise ValueError(
                f"{self.folder} holds {stored} of {self.n_rows} rows: call cache_to again, and it goes on there"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.run["sites"])

    def __len__(self) -> int:
        return len(self.run["sites"])

    def __getitem__(self, key: str | tuple[str, int | None]) -> Tensor:
        return self.rows(key, 0, self.n_rows)

    def rows(self, key: str | tuple[str, int | None], start: int, stop: int) -> Float[Tensor, "rows *site"]:
        """The rows from ``start`` to before ``stop``. No other row is read.

        Raises:
            ValueError: for rows that are not there.
            KeyError: for a site that is not there.
        """
        name = self._name(key)
        start = whole_number(start, "start", least=0, most=self.n_rows - 1)
        stop = whole_number(stop, "stop", least=start + 1, most=self.n_rows)
        found = [
            self._read(path, name, max(start - first, 0), min(stop, end) - first)
            for first, end, path in self._files
            if first < stop and end > start
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def batches(self, key: str | tuple[str, int | None]) -> Iterator[Float[Tensor, "rows *site"]]:
        """The rows of each file, in order."""
        name = self._name(key)
        return (self._read(path, name, 0, end - first) for first, end, path in self._files)

    def _name(self, key: str | tuple[str, int | None]) -> str:
        """A site's key in the files."""
        for name in (key, full_name(key)):
            if name in self.run["sites"]:
                return str(name)
        raise KeyError(key)

    @staticmethod
    def _read(path: Path, name: str, start: int, stop: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(name)[start:stop]
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole file of activations: {error}") from None


def _reading(model: MambaModel, prompts: Tokens | PromptPairs, sites, positions: Positions) -> Reading:
    """What is to be read; of pairs, of their clean prompts.

    Raises:
        ValueError: as `cache`; for a site that has no rows.
    """
    if isinstance(prompts, PromptPairs):
        check_fit(model, prompts)
        prompts = prompts.clean_tokens
    reading = Reading.make(model, prompts, sites, positions=positions)
    for ref in reading.plan.reads:
        if "B" not in ref.site.shape:
            raise ValueError(f"the site {ref.site.name!r} is the same for all prompts: read it once, by cache")
    return reading


def _identity(reading: Reading) -> dict[str, Any]:
    """What tells a run from others: the model, its weights where they are here, the prompts, what is read of them."""
    model, keep = reading.model, reading.plan.keep
    weights = None if model.remote is not None else hashlib.sha256()
    if weights is not None:
        for name, value in sorted(model._module.state_dict().items()):
            weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            weights.update(_bytes(value))
    return {
        "model": model.model_id,
        "revision": None if model.revision is None else str(model.revision),
        "dtype": str(model.dtype),
        "device": None if model.remote is None else str(model.remote),
        "weights": None if weights is None else weights.hexdigest(),
        "rows": len(reading.ids),
        "prompts": hashlib.sha256(_bytes(reading.ids)).hexdigest(),
        "sites": list(dict.fromkeys(ref.key for ref in reading.plan.reads)),
        "positions": None if keep is None else hashlib.sha256(f"{keep.tolist()}".encode()).hexdigest(),
    }


def _bytes(value: Tensor) -> Any:
    """A tensor's bytes, for a hash."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _refuse_another(folder: Path, stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a folder of other activations.

    Raises:
        ValueError: which names the first thing that differs.
    """
    for name, value in here.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{folder} holds activations of another run, whose entry {name!r} is {stored.get(name)!r:.60}, here "
                f"{value!r:.60}: choose another folder"
            )


def _read_meta(folder: Path) -> dict[str, Any]:
    """What the folder says of itself.

    Raises:
        ValueError: if it says nothing, or in a way that this version does not read.
    """
    file = folder / META_FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no folder of activations: {META_FILE} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file} is not readable as JSON: {error}") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("run"), dict):
        raise ValueError(f"{file} was not written by cache_to")
    if meta.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} is of format version {meta.get('format_version')!r}; this version of mamba_ioi reads version "
            f"{FORMAT_VERSION}"
        )
    return meta


def _shards(folder: Path) -> list[tuple[int, int, Path]]:
    """The files from the first row on that follow one another: first row, the row after the last, path."""
    found = {}
    for path in folder.iterdir():
        if match := _SHARD.fullmatch(path.name):
            found[int(match[1])] = int(match[2]), path
    ordered, start = [], 0
    while start in found:
        stop, path = found[start]
        ordered.append((start, stop, path))
        start = stop
    return ordered
