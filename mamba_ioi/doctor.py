"""`doctor`: is everything here that the numbers stand on, and does the slow path agree with the untouched model?"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .result import package_versions
from .zoo import EMBEDDED

KERNELS = ("mamba_ssm", "causal_conv1d")
LETTERS = {
    "B": "batch",
    "L": "positions",
    "D": "d_model",
    "E": "d_inner",
    "N": "d_state",
    "R": "dt_rank",
    "H": "heads",
    "P": "head_dim",
    "G": "groups of heads that share B and C",
    "X": "channels of the conv (E + 2GN)",
    "K": "taps of the conv",
    "V": "vocabulary",
}
"""What the letters stand for in which sites' shapes are written."""


def explained(letters: Iterable[str], sizes: Mapping[str, int] = {}) -> str:
    """Those letters in one order, with what they stand for and the model's size of each: ``D d_model = 96, ...``."""
    wanted = set(letters)
    known = [letter for letter in LETTERS if letter in wanted]
    return ", ".join(
        f"{letter} {LETTERS[letter]}" + (f" = {sizes[letter]}" if letter in sizes else "") for letter in known
    )


def numbered(layers: Sequence[int]) -> str:
    """Numbers of layers, those that follow one another as from-to: ``0-3, 5``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def layers_by_kind(model) -> str:
    """Which layers are of which kind: ``0-1, 3 mamba+mlp; 2 attention+mlp``."""
    kinds: dict[str, list[int]] = {}
    for layer, kind in enumerate(model.layer_kinds):
        kinds.setdefault(kind, []).append(layer)
    return "; ".join(f"layer{'s' * (len(some) > 1)} {numbered(some)} {kind}" for kind, some in kinds.items())


@dataclass(frozen=True)
class Check:
    """One line of the examination: what was looked at, what was found, and whether that is as it should be."""

    item: str
    found: str
    well: bool = True


def examine(
    model: str, *, device: str | None = None, dtype: str | None = None, remote: bool | str = False
) -> Iterator[Check]:
    """Versions, transformers' operations, fast kernels, devices, and one model's slow path, here or on a server.

    Yields:
        A finding at a time; the examination ends at the first one that lets nothing further be examined.

    Raises:
        ValueError: for a model of the user's own that cannot be loaded; for a packaged one that is a finding.
        ConnectionError: if the server cannot be reached.
    """
    from . import __version__

    yield Check("mamba_ioi", __version__)
    for package, version in package_versions().items():
        if package != "mamba_ioi":
            yield Check(package, version or "not installed", well=version is not None)
    try:
        from .models.model import load_model
    except ImportError as error:
        yield Check("transformers' era", str(error), well=False)
        return
    for kernel in KERNELS:
        yield Check(f"kernel {kernel}", _kernel(kernel))
    yield Check("devices", _devices())
    if remote:
        yield from _server(model, load_model(model, remote=remote))
        return
    try:
        loaded = load_model(model, device=device, dtype=dtype)
    except ValueError as error:
        if model not in (*EMBEDDED, "planted"):
            raise
        yield Check(f"model {model}", str(error), well=False)
        return
    kind = type(loaded._module).__name__
    yield Check(
        f"model {model}",
        f"{kind}, {loaded.n_layers} layers, {str(loaded.dtype).removeprefix('torch.')}, {loaded.device}",
    )
    yield from _family(loaded)
    if loaded.has_scans:
        yield from _sites(loaded)
    else:
        yield Check("slow path", f"none: a {kind} is no Mamba; layer removal and residual edges work on it")


def _server(name: str, model) -> Iterator[Check]:
    """Whether the server is there, has the versions that are here, and runs the model, and how."""
    from nnsight.schema.config import CONFIG

    from .models.slow_path import slow_path_tolerance
    from .remote.ndif import compare, get
    from .remote.requests import serve

    host = model.remote.host
    get(host, "/ping")
    yield Check("server", f"{model.remote} answers")
    packages = compare(host).packages
    for package in ("torch", "transformers", "nnsight"):
        there = packages.get(package, {"remote": "not installed", "local": "?", "match": False})
        found = there["remote"] if there["match"] else f"{there['remote']}, here {there['local']}"
        yield Check(f"server's {package}", found, well=there["remote"] != "not installed")
    email = get(host, "/whoami", api_key=CONFIG.API.APIKEY).get("email")
    yield Check("API key", f"of {email}" if email else "none that the server knows (NDIF_API_KEY)")
    yield from _family(model)
    running = [
        one["application_state"]
        for one in get(host, "/status").get("deployments", {}).values()
        if one.get("repo_id", "").lower() == model.model_id.lower() and one.get("application_state")
    ]
    yield Check(f"model {name}", f"{running[0].lower()} there" if running else "not running there; it is asked for now")
    served = serve(model)
    yield Check("served in", str(served.dtype).removeprefix("torch."))
    yield Check(
        "requests run",
        "trusted: in the model's process, with weights and gradients"
        if served.trusted
        else "in a sandbox: no weights and no gradients, so everything but eap",
    )
    if served.difference is not None:
        limit = slow_path_tolerance(served.dtype)
        yield Check(
            "slow path", f"agrees on the server: {served.difference:.1e} of the largest value (limit {limit:.0e})"
        )


def _family(model) -> Iterator[Check]:
    """What the model is made of, and whether circuits can be found in it."""
    yield Check("family", f"{model.family}: {explained(model.sizes(), model.sizes())}")
    yield Check("layers", layers_by_kind(model))
    if model.remote is None and (reason := model.anatomy.broken or model.anatomy.beside):
        yield Check("circuits", f"none: {reason}")


def _sites(model) -> Iterator[Check]:
    """Whether the operations that the sites stand on are there, and how far the slow path is from the model's own."""
    from .models.slow_path import check_slow_path, slow_path_tolerance
    from .trace.sites import missing_operations

    sites = model.known_sites()
    missing = missing_operations(next(layer for layer in model.layers if layer.chains).mixer)
    found = (
        f"without {' and '.join(missing)}" if missing else f"has the operations that the {len(sites)} sites stand on"
    )
    yield Check("transformers' era", found, well=not missing)
    try:
        difference = check_slow_path(model)
    except ValueError as error:
        yield Check("slow path", str(error), well=False)
        return
    limit = slow_path_tolerance(model.dtype)
    yield Check(
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
