"""`doctor`: is everything here that the numbers stand on, and does the slow path agree with the untouched model?"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from .result import package_versions

KERNELS = ("mamba_ssm", "causal_conv1d")


@dataclass(frozen=True)
class Finding:
    """One line of the examination: what was looked at, what was found, and whether that is as it should be."""

    item: str
    found: str
    well: bool = True


def examine(model: str, *, device: str | None = None, dtype: str | None = None) -> Iterator[Finding]:
    """Versions, transformers' operations, fast kernels, devices, and one model's slow path.

    Yields:
        A finding at a time; the examination ends at the first one that lets nothing further be examined.

    Raises:
        ValueError: for a model of the user's own that cannot be loaded; for a packaged one that is a finding.
    """
    from . import __version__

    yield Finding("mamba_ioi", __version__)
    for package, version in package_versions().items():
        if package != "mamba_ioi":
            yield Finding(package, version or "not installed", well=version is not None)
    try:
        from .model import load_model
    except ImportError as error:
        yield Finding("transformers' era", str(error), well=False)
        return
    for kernel in KERNELS:
        yield Finding(f"kernel {kernel}", _kernel(kernel))
    yield Finding("devices", _devices())
    try:
        loaded = load_model(model, device=device, dtype=dtype)
    except ValueError as error:
        if model not in ("tiny", "planted"):
            raise
        yield Finding(f"model {model}", str(error), well=False)
        return
    kind = type(loaded._module).__name__
    yield Finding(
        f"model {model}",
        f"{kind}, {loaded.n_layers} layers, {str(loaded.dtype).removeprefix('torch.')}, {loaded.device}",
    )
    if loaded.is_mamba:
        yield from _sites(loaded)
    else:
        yield Finding("slow path", f"none: a {kind} is no Mamba; layer removal and residual edges work on it")


def _sites(model) -> Iterator[Finding]:
    """Whether the operations that the sites stand on are there, and how far the slow path is from the model's own."""
    from .model import check_slow_path, slow_path_tolerance
    from .sites import SITES, missing_operations

    missing = missing_operations(model.layers[0].mixer)
    found = (
        f"without {' and '.join(missing)}" if missing else f"has the operations that the {len(SITES)} sites stand on"
    )
    yield Finding("transformers' era", found, well=not missing)
    try:
        difference = check_slow_path(model)
    except ValueError as error:
        yield Finding("slow path", str(error), well=False)
        return
    limit = slow_path_tolerance(model.dtype)
    yield Finding(
        "slow path", f"agrees: largest difference {difference:.1e} of the largest value at its site (limit {limit:.0e})"
    )


def _kernel(name: str) -> str:
    """Whether the package can be imported."""
    if find_spec(name) is None:
        return "not installed: transformers' own forward is slower, and the numbers are the same"
    try:
        importlib.import_module(name)
    except Exception as error:  # a kernel built for another torch or CUDA fails in its own ways
        return f"installed, but cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return "found"


def _devices() -> str:
    import torch

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return ", ".join(devices)
