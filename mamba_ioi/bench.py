"""`bench`: what the work costs on a real model's shape, with random weights, as ratios of one run.

Machines are noisy, so times are never compared across runs: each line sets a piece of work against another that was
timed beside it, taking turns, the smallest time of each.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .circuits import eap
from .circuits.graph import Graph
from .circuits.measure import MANY, Evaluator
from .experiments import resample_ablation
from .interventions.patch import Resample
from .interventions.readout import Readout
from .interventions.run import run
from .interventions.sweep import sweep
from .interventions.token_to_token import hidden_attention, token_contributions
from .models.model import CausalLM, MambaModel, load_model, wrap
from .tasks.ioi import IOIDataset
from .zoo import shapes

SECONDS = 5.0
"""A work is timed again until its times add up to this, since a short one is easily disturbed."""


@dataclass(frozen=True)
class Line:
    """One measurement: what was done, the ratio, what it is a ratio to, and the times behind it."""

    work: str
    ratio: float
    to: str
    times: str


def bench(
    *,
    family: str = shapes.FIRST,
    layers: int | None = None,
    prompts: int = 32,
    repeats: int = 2,
    device: str | None = None,
    dtype: str | None = None,
    only: Sequence[str] | None = None,
) -> Iterator[Line]:
    """Measure one piece of work after another.

    Args:
        family: of the model, one of `zoo.shapes.SHAPES`.
        layers: of the model; all that it has if None: 48 of mamba-370m and mamba2-370m, 64 of falcon-mamba-7b.
        prompts: rows of the forward pass; the other works take a fraction of them.
        repeats: least number of timings of each piece of work, of which the smallest counts.
        device: where to compute; the CPU unless given.
        dtype: of the weights; float32 unless given.
        only: names of `WORKS`; all of them if None.

    Yields:
        Each line as soon as it is measured.

    Raises:
        ValueError: for an unknown piece of work or another family.
    """
    chosen = list(WORKS) if only is None else list(only)
    if unknown := [name for name in chosen if name not in WORKS]:
        raise ValueError(f"there is no work {unknown[0]!r} to measure; there are {', '.join(WORKS)}")
    model = of_shape(family, layers, getattr(torch, dtype or "float32"), device or "cpu")
    for name in chosen:
        yield from WORKS[name](model, prompts, repeats)


def of_shape(
    family: str, layers: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> MambaModel | CausalLM:
    """The shape of the family's model, random weights, `tiny`'s tokenizer, whose ids are in the vocabulary.

    Args:
        family: one of `zoo.shapes.SHAPES`.
        layers: how many; all that the model has if None.
        dtype: of the weights.
        device: where they are.

    Raises:
        ValueError: for another family.
    """
    module = shapes.of_shape(family, layers).to(device=device, dtype=dtype)
    name, *_ = shapes.SHAPES[family]
    return wrap(module, load_model("tiny").tokenizer, model_id=f"{name} shape, random weights")


def timed(repeats: int, *works: Callable[[], object]) -> list[float]:
    """The smallest time of each piece of work in seconds, the pieces taken in turn, each at least for `SECONDS`."""
    times: list[list[float]] = [[] for _ in works]
    while wanting := [i for i, mine in enumerate(times) if len(mine) < repeats or sum(mine) < SECONDS]:
        for i in wanting:
            start = time.perf_counter()
            works[i]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[i].append(time.perf_counter() - start)
    return [min(mine) for mine in times]


def pairs(model: MambaModel, rows: int) -> IOIDataset:
    """Aligned prompts."""
    return IOIDataset.generate(model.tokenizer, -(-rows // 2))[:rows]


def untouched(model: MambaModel, data: IOIDataset) -> Callable[[], None]:
    """Hugging Face's own forward, with last-position logits."""
    tokens = data.clean_tokens.to(model.device)

    def work() -> None:
        with torch.no_grad():
            model._module(tokens, use_cache=False, logits_to_keep=1)

    return work


def matrix_products(model: MambaModel, rows: int) -> Callable[[], None]:
    """The matrix products of a forward of ``rows`` positions, and nothing else."""
    x = torch.randn(rows, model.d_model, dtype=model.dtype, device=model.device)
    blocks = [block.mixer for block in model._module.backbone.layers]

    def work() -> None:
        with torch.no_grad():
            for mixer in blocks:
                inner = mixer.in_proj(x)[:, : model.d_inner]
                if hasattr(mixer, "x_proj"):
                    mixer.dt_proj(mixer.x_proj(inner)[:, : model.dt_rank])
                mixer.out_proj(inner)

    return work


def forward(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """One traced forward with last-position logits."""
    data = pairs(model, prompts)
    run(model, data.clean_tokens[:2])
    rows = data.clean_tokens.numel()
    hf, ours, products = timed(
        repeats, untouched(model, data), lambda: run(model, data.clean_tokens), matrix_products(model, rows)
    )
    times = f"{ours:.2f} s; untouched {hf:.2f} s, products {products:.2f} s"
    yield Line(f"traced forward of {prompts} prompts", ours / hf, "an untouched forward", times)
    yield Line(f"traced forward of {prompts} prompts", ours / products, "its matrix products alone", times)


def cells(site: str) -> Callable[[MambaModel, int, int], Iterator[Line]]:
    """A layer x position resample sweep of a site, per cell and prompt."""

    def work(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
        data = pairs(model, max(2, prompts // 4))
        layers = range(0, model.n_layers, max(1, model.n_layers // 12))
        length = data.clean_tokens.shape[1]
        grid = [[Resample(site, layer, position)] for layer in layers for position in range(length)]
        readout = Readout.of(data)
        hf, ours = timed(
            1,
            untouched(model, data),
            lambda: sweep(model, data.clean_tokens, grid, readout, source=data.corrupt_tokens),
        )
        times = f"{ours:.1f} s for {len(grid)} cells of {len(data)} prompts; untouched {hf:.2f} s"
        yield Line(f"resample {site}, a cell and prompt", ours / len(grid) / hf, "an untouched forward", times)

    return work


def attribution(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """A whole layer x position map estimated, with the effects that are measured beside it."""
    data = pairs(model, max(2, prompts // 4))
    results = []
    hf, ours = timed(
        1,
        untouched(model, data),
        lambda: results.append(resample_ablation(model, data, estimate="attribution", progress=False)),
    )
    correlation = results[0].meta["rank_correlation"]
    times = f"{ours:.1f} s for {len(data)} prompts; untouched {hf:.2f} s; rank correlation {correlation:.3f}"
    yield Line("map of layer_input by attribution", ours / hf, "an untouched forward", times)


def gradients(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """EAP with 5 steps, coarse, and positional and fine; and the memory that the process has come to."""
    data = pairs(model, max(2, prompts // 5))
    plain, coarse, full = timed(
        repeats,
        lambda: [run(model, data.clean_tokens) for _ in range(5)],
        lambda: eap(model, data, steps=5),
        lambda: eap(model, data, steps=5, positional=True, fine=True),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = f"{coarse:.1f} s for {len(data)} rows; 5 forwards {plain:.1f} s; peak of the process {peak:.1f} GiB"
    yield Line("EAP, 5 steps", coarse / plain, "5 of our own forwards", times)
    yield Line("positional and fine EAP", full / coarse, "the coarse one", f"{full:.1f} s")


def tested_edges(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """What ACDC pays for an edge tested in the whole graph: candidates at some nodes, weighed by the nodes' edges."""
    data = pairs(model, max(2, prompts // 4))
    graph = Graph(model.n_layers)
    circuits = Evaluator(model, data, graph, together=MANY)
    circuits.start_from(torch.ones(len(graph.pairs), graph.width, dtype=torch.bool))
    nodes = sorted({round(node) for node in np.linspace(0, model.n_layers, 5)})
    costs = []
    for node in nodes:
        edges = list(range(len(graph.pairs)))[graph.into(node)][:MANY]
        masks = torch.ones(len(edges), len(graph.pairs), graph.width, dtype=torch.bool)
        masks[torch.arange(len(edges)), edges] = False
        (seconds,) = timed(1, lambda masks=masks: circuits.measure(masks))
        costs.append(seconds / len(edges))
    (hf,) = timed(1, untouched(model, data))
    everywhere = np.arange(model.n_layers + 1)
    each = float(np.average(np.interp(everywhere, nodes, costs), weights=everywhere + 1))
    shown = ", ".join(f"{cost:.2f} s into node {node}" for node, cost in zip(nodes, costs, strict=True))
    yield Line("ACDC, a tested edge", each / hf, "an untouched forward", f"{shown}; untouched {hf:.2f} s")


def between_tokens(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """What one layer moves between 512 tokens, as a matrix and as contributions to the stream, and their memory."""
    one, length = of_shape(model.family, 1, model.dtype, str(model.device)), 512
    tokens = torch.randint(0, 500, (1, length), device=model.device)
    block, x = one._module.backbone.layers[0], torch.randn(1, length, one.d_model, dtype=model.dtype)
    x = x.to(model.device)

    def layer() -> None:
        with torch.no_grad():
            block(x)

    works = {"hidden_attention": hidden_attention, "token_contributions": token_contributions}
    for name, work in works.items():
        layer()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        hf, ours = timed(repeats, layer, lambda work=work: work(one, tokens, 0))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        times = (
            f"{ours:.2f} s for E {one.d_inner}, N {one.d_state}; the layer {hf:.3f} s; the peak grew by {grown:.2f} GiB"
        )
        yield Line(f"{name}, a layer, {length} tokens", ours / hf, "an untouched forward of the layer", times)


def imports(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """Importing the package, and what `load_model` needs of it, in a process of their own."""
    theirs = "import nnsight, transformers; from transformers import MambaForCausalLM"
    ours = "import mamba_ioi; mamba_ioi.load_model"
    both = [lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for code in (theirs, ours)]
    base, own = timed(3, *both)
    yield Line("import mamba_ioi and load_model", own / base, "nnsight and transformers", f"{own:.1f} s, {base:.1f} s")


def exponents(model: MambaModel, prompts: int, repeats: int) -> Iterator[Line]:
    """How a forward's cost grows with the prompt's length and with the layers: exponents of power laws."""
    lengths = [20, 80, 320]
    batches = [torch.randint(0, 500, (4, length), device=model.device) for length in lengths]
    times = timed(repeats, *(lambda tokens=tokens: run(model, tokens) for tokens in batches))
    yield Line("cost by length, exponent", _slope(lengths, times), "linear", _listed(lengths, times))
    depths = sorted({max(2, model.n_layers // 4), max(2, model.n_layers // 2), model.n_layers})
    models = [of_shape(model.family, depth, model.dtype, str(model.device)) for depth in depths]
    times = timed(repeats, *(lambda one=one: run(one, batches[0]) for one in models))
    yield Line("cost by layers, exponent", _slope(depths, times), "linear", _listed(depths, times))


def _slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def _listed(sizes: Sequence[int], times: Sequence[float]) -> str:
    return ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in zip(sizes, times, strict=True))


WORKS: dict[str, Callable[[MambaModel, int, int], Iterator[Line]]] = {
    "forward": forward,
    "sweep": cells("layer_input"),
    "h": cells("h"),
    "attribution": attribution,
    "eap": gradients,
    "acdc": tested_edges,
    "tokens": between_tokens,
    "import": imports,
    "exponents": exponents,
}
"""Every piece of work by name: given the model, the prompts and the repeats, its lines."""
