"""Result: the table an experiment returns, what it was made with, and how both are stored and drawn.

A saved result is a folder with two files, `table.parquet` and `meta.json`. Nothing is ever pickled or unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import __version__
from .catalogue import drawer
from .checks import integer, real_number
from .files import replace_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TABLE_FILE = "table.parquet"
META_FILE = "meta.json"
_STORED_ONLY = ("format_version", "table_sha256")
_PACKAGES = ("torch", "transformers", "nnsight")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")


@dataclass(frozen=True, eq=False)
class Result:
    """What an experiment found, and what is needed to repeat it.

    Attributes:
        table: tidy data, one observation a row; its index is always 0 … n-1.
        meta: `experiment` (the name that chooses the figure), and, when made by `Result.create`, `model`,
            `revision`, `dtype`, `device`, `n_layers`, `arguments`, `seed`, `versions`, `date` (UTC, ISO 8601).
            Held as JSON holds it: tuples become lists, the keys of mappings strings.

    Raises:
        ValueError: the table is not a DataFrame with unique text column names, or `meta` has no experiment name
            or holds a value that JSON cannot store.
    """

    table: pd.DataFrame
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.table, pd.DataFrame):
            raise ValueError(f"a Result's table must be a pandas DataFrame, not {type(self.table).__name__}")
        columns = list(self.table.columns)
        if len(set(columns)) != len(columns) or not all(isinstance(column, str) for column in columns):
            raise ValueError(f"a Result's table needs unique text column names; it has {columns}")
        meta = _as_json(self.meta)
        experiment = meta.get("experiment")
        if not isinstance(experiment, str) or not experiment:
            raise ValueError(f"a Result's meta must name its experiment in meta['experiment']; it holds {experiment!r}")
        object.__setattr__(self, "table", self.table.reset_index(drop=True))
        object.__setattr__(self, "meta", meta)

    @classmethod
    def create(
        cls,
        experiment: str,
        table: pd.DataFrame,
        *,
        model: object,
        arguments: Mapping[str, Any],
        seed: int | None = None,
        **extra: Any,
    ) -> Result:
        """A Result whose meta says when, with which model, and with which package versions it was made.

        Args:
            experiment: the experiment's name, of a row of the catalogue if it has a figure.
            table: tidy data, one observation a row.
            model: read for `model_id` (or `name_or_path`), `revision`, `dtype`, `device`, `n_layers`, each optional; of
                a remote model, ``dtype`` is what the server computed in, and ``device`` the server's URL.
            arguments: the arguments the experiment was called with; numbers and arrays of numpy or torch are stored
                as Python's.
            seed: the seed of the data, where there is one.
            **extra: more entries of meta, such as units or notes.

        Raises:
            ValueError: as `Result`; or an entry of `extra` would overwrite one that is filled in here.
        """
        remote = getattr(model, "remote", None)
        model_id = getattr(model, "model_id", None) or getattr(model, "name_or_path", None)
        meta: dict[str, Any] = {
            "experiment": experiment,
            "model": _text(model_id),
            "revision": _text(getattr(model, "revision", None)),
            "dtype": _text(getattr(model, "dtype", None)),
            "device": _text(getattr(model, "device", None)) if remote is None else str(remote),
            "n_layers": getattr(model, "n_layers", None),
            "arguments": dict(arguments),
            "seed": seed,
            "versions": package_versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if taken := sorted(meta.keys() & extra.keys()):
            raise ValueError(f"meta[{taken[0]!r}] is filled in by Result.create; give the extra entry another name")
        return cls(table, _as_json(meta | extra, default=jsonable))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `table.parquet` and `meta.json` into `folder`, which is made if absent; return the folder.

        Both files are complete on disk before either takes its name, and `meta.json` takes its name last: its
        presence marks a complete result. It holds the table's SHA-256, so that a save interrupted between the two
        renames is seen when loading.

        Raises:
            ValueError: a column holds values that parquet cannot store.
        """
        buffer = io.BytesIO()
        try:
            self.table.to_parquet(buffer, index=False)
        except Exception as error:  # pyarrow raises errors of many types
            raise ValueError(f"the table cannot be stored as parquet: {_first_line(error)}") from error
        table = buffer.getvalue()
        stored = {"format_version": FORMAT_VERSION, "table_sha256": hashlib.sha256(table).hexdigest(), **self.meta}
        text = json.dumps(stored, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        meta = text.encode("utf-8", "backslashreplace")  # bytes of a file's name that are no UTF-8, as JSON's escapes
        folder = Path(os.path.expanduser(folder))
        replace_files(folder, {TABLE_FILE: table, META_FILE: meta})
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Result:
        """Read a folder that `save` wrote. Pickles are never read.

        Raises:
            ValueError: the folder or one of its two files is missing, unreadable, of another format version, or
                the two files are not of the same save.
        """
        folder = Path(os.path.expanduser(folder))
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder with a saved result")
        files = {name: folder / name for name in (META_FILE, TABLE_FILE)}
        for name, file in files.items():
            if not file.is_file():
                raise ValueError(f"{folder} holds no complete result: {name} is missing{_pickle_note(folder)}")
        try:
            meta = json.loads(files[META_FILE].read_text(encoding="utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"{files[META_FILE]} is not readable as JSON: {_first_line(error)}") from error
        if not isinstance(meta, dict) or "format_version" not in meta:
            raise ValueError(f"{files[META_FILE]} has no format_version: it was not written by Result.save")
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder} is of format version {meta['format_version']!r}; this version of mamba_ioi reads "
                f"version {FORMAT_VERSION}"
            )
        content = files[TABLE_FILE].read_bytes()
        try:
            table = pd.read_parquet(io.BytesIO(content))
        except Exception as error:  # pyarrow raises errors of many types
            raise ValueError(f"{files[TABLE_FILE]} is not readable as parquet: {_first_line(error)}") from error
        if hashlib.sha256(content).hexdigest() != meta.get("table_sha256"):
            raise ValueError(
                f"{files[TABLE_FILE]} is not the table that {META_FILE} describes: one of the two was replaced"
            )
        return cls(table, {key: value for key, value in meta.items() if key not in _STORED_ONLY})

    def plot(self) -> Figure:
        """The figure of this result's experiment (`mamba_ioi.figures`).

        Raises:
            ValueError: the experiment has no figure, or the table lacks a column that its figure needs.
        """
        return drawer(self.meta["experiment"])(self)


def note_precisions(*made: object) -> None:
    """Warn where numbers computed in different precisions are set beside each other.

    Args:
        *made: results, and models that compute now; anything else has no known precision.
    """
    dtypes = {one.meta.get("dtype") if isinstance(one, Result) else _text(getattr(one, "dtype", None)) for one in made}
    if len(known := sorted(dtype for dtype in dtypes if dtype is not None)) > 1:
        logger.warning("computed in %s: they differ by the rounding of the coarser one", " and in ".join(known))


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "mamba_ioi": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def bootstrap_interval(
    values: ArrayLike, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Any, Any]:
    """Percentile bootstrap interval of the mean over the last axis (Efron & Tibshirani 1993, chapter 13).

    All leading entries share the same resamples, so that intervals of one table are drawn from the same prompts.

    Args:
        values: finite numbers [..., n], one a prompt.
        n_resamples: how many resamples of n prompts, drawn with replacement.
        level: the share of resampled means inside the interval.
        seed: of the resampling; the same values and seed give the same interval.

    Returns:
        low [...], high [...]: arrays, or numpy's floats for values [n]. With n = 1, both are the value itself.

    Raises:
        ValueError: no value, a value that is not finite, `level` outside (0, 1), or `n_resamples` < 1.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"a bootstrap interval needs at least one value on the last axis; the shape is {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a bootstrap interval needs finite values; some are NaN or infinite")
    if (share := real_number(level)) is None or not 0 < share < 1:
        raise ValueError(f"level must lie between 0 and 1, both excluded; it is {level}")
    if (resamples := integer(n_resamples)) is None or resamples < 1:
        raise ValueError(f"n_resamples must be at least 1; it is {n_resamples}")
    n = array.shape[-1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = array @ (counts.T / n)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2], axis=-1)
    smallest, largest = array.min(axis=-1), array.max(axis=-1)
    return np.clip(low, smallest, largest), np.clip(high, smallest, largest)


def _as_json(meta: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """The mapping as it would be after a journey through JSON; refuses what JSON cannot store.

    ``default`` makes something that JSON stores of what it does not.
    """
    stored = {}
    for key, value in meta.items():
        if not isinstance(key, str) or key in _STORED_ONLY:
            raise ValueError(f"meta's keys must be text other than {' and '.join(_STORED_ONLY)}; {key!r} is not")
        try:
            stored[key] = json.loads(json.dumps(value, allow_nan=False, default=default))
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta[{key!r}] must be storable as JSON, {value!r} is not: {error}") from error
    return stored


def jsonable(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as JSON holds them."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return value.tolist()


def _pickle_note(folder: Path) -> str:
    """Half a sentence on a pickle that lies in the folder, if one does."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    return f" ({pickles[0]} is a pickle, and pickles are never loaded)" if pickles else ""


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
