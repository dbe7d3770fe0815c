"""Edges from token to token inside a scan: how much the metric would change if one were resampled.

Of ``y_t = sum over s <= t of C_t (A_bar_(s+1) ... A_bar_t) w_s``, an edge (layer, s, t) is one term, and resampling it
puts the corrupt run's write in place of the clean one. With g_t the gradient of the metric at y_t, averaged over steps
between the clean and the corrupt run (integrated gradients on the embeddings, arXiv 2403.17806, as `eap` has it),

    score(s -> t) = mean over rows of g_t . C_t (A_bar_(s+1) ... A_bar_t) (w'_s - w_s)

with C, A_bar and w of the clean run. What is not in the writes goes by the controls of a position t: delta, as the
state decays there, and C, by which it is read. Their score is the same sum over targets, with what the corrupt run's
controls change at y from t on. One backward pass a step gives every g_t; then all pairs of a layer are one sum over
rectangles of targets and sources, in O(L^2 E N) time, with states at a few positions in memory.

In circuits these are the edges ``39.write[s] -> 39.ssm`` and ``39.controls -> 39.ssm`` of a graph with ``ssm="tokens"``
(see `graph`), which `eap`, `exact_effects`, `acdc` and `evaluate` take beside all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import integers, whole_number
from ..experiments.common import resample_effects
from ..interventions.cut import Cut
from ..interventions.patch import Resample, resolve
from ..interventions.plan import Frozen
from ..interventions.run import run
from ..memory import backward_bytes, fitting_rows
from ..remote.requests import ask, require_gradients
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, metric_name
from ..trace.mixing import Units, contracted
from ..trace.tokens import controls_effects, written
from .forward import Beginning, Pass, beginning, run_nodes
from .pairs import Pairs

MOST_ROWS = 32


@torch.inference_mode(False)  # gradients are asked for here, whatever mode the caller is in
def token_edges(
    model,
    pairs: PromptPairs,
    *,
    steps: int = 5,
    layers: Sequence[int] | int | None = None,
    exact: bool = False,
    controls: bool = False,
    absolute: bool = True,
    metric: Metric | None = None,
    progress: bool = False,
) -> Result:
    """Score every edge from token to token inside the scans, by integrated gradients or by measuring each one.

    Sources are positions of writes: a token that the conv reads through its tap -1 is written one position later.

    Args:
        model: a model with scans.
        pairs: aligned pairs of prompts.
        steps: how many points between clean and corrupt run the gradients are taken at; 1 is at the clean run alone.
        layers: which layers; all that have a scan if None.
        exact: measure instead: each edge cut alone (`Cut`, resampled), by a sweep.
        controls: score also each position's controls: delta, as the state decays there, and C, by which it is read.
        absolute: the metric is the normalized logit difference over |max - min| (App. B), or else over max - min.
        metric: another metric, as `PromptPairs` has them, whose own change is scored; the pairs' own if None.
        progress: show a progress bar.

    Returns:
        A Result with a row for each layer and pair of positions, source <= target: layer, source, target, score: the
        change of the metric when the edge is resampled, averaged over rows. Negative: the edge is needed. With
        ``controls``, also a row for each layer and target with source -1: the target's controls resampled.

    Raises:
        ValueError: for pairs that are not aligned; for a layer without a scan, or less than one step; on a server whose
            sandbox has no gradients (but where ``exact``); for a model that carries edits or hooks.
    """
    model.require_mamba("token edges")
    steps = whole_number(steps, "steps", least=1)
    if layers is None:
        chosen = [layer for layer in range(model.n_layers) if "write" in model.layer_sites(layer)]
    else:
        chosen = integers(layers, "layer")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"layers are at least one, each once, not {layers!r}")
        for layer in chosen:
            resolve(model, "write", layer)
    model.require_stream("token edges", edges=True)
    checked = Pairs.of(model, pairs, positional=True, metric=metric)
    if exact:
        scores = _measured(model, pairs, checked, chosen, controls, absolute, progress)
    else:
        require_gradients(model, "attribution of token edges")
        scores = _estimated(model, checked, chosen, steps, controls, absolute, progress)
    if not scores.isfinite().all():
        raise ValueError("some scores are not finite: the model's activations or gradients overflow on these data")
    target, source = torch.tril_indices(checked.length, checked.length)
    if controls:  # whose column is the last
        every = torch.arange(checked.length)
        target, source = torch.cat([target, every]), torch.cat([source, torch.full_like(every, -1)])
    parts = [
        pd.DataFrame({"layer": layer, "source": source, "target": target, "score": found[target, source]})
        for layer, found in zip(chosen, scores, strict=True)
    ]
    arguments = {"steps": None if exact else steps, "layers": chosen, "exact": exact, "controls": controls}
    arguments["absolute"] = absolute
    arguments["metric"] = metric_name(checked.metric)
    table = pd.concat(parts, ignore_index=True)
    return Result.create("token_edges", table, model=model, arguments=arguments, n_rows=len(checked))


def _estimated(
    model, pairs: Pairs, layers: Sequence[int], steps: int, controls: bool, absolute: bool, progress: bool
) -> Float[Tensor, "layers L S"]:
    """The scores ``[layers, target, source]`` by integrated gradients; the last source stands for the controls."""
    total = torch.zeros(len(layers), pairs.length, pairs.length + 1, dtype=torch.float64)
    rows = fitting_rows(model, backward_bytes(model, pairs.length - int(pairs.start[0])), MOST_ROWS)
    alphas = [k / max(steps - 1, 1) for k in range(steps)]
    batches = list(pairs.chunks(rows))
    with Frozen(model), tqdm(total=len(batches) * steps, desc="token edges", disable=not progress) as bar:
        note = bar.update if model.remote is None else None
        for batch in batches:
            given = batch, list(layers), alphas, len(pairs), controls, absolute
            total += ask(model, attributed_tokens, *given, aside=(note,))["scores"].cpu()
            if note is None:
                bar.update(steps)
    return total


def _measured(
    model, data: PromptPairs, pairs: Pairs, layers: Sequence[int], controls: bool, absolute: bool, progress: bool
) -> Float[Tensor, "layers L S"]:
    """The scores ``[layers, target, source]``, each edge resampled alone; before the prompts part there are none."""
    begin, stop = int(pairs.start.min()), int(pairs.last.max()) + 1
    targets = list(product(range(len(layers)), range(begin, stop)))
    edges = [(i, t, s) for i, t in targets for s in range(begin, t + 1)]
    cuts: list[Sequence[Cut | Resample]] = [[Cut(layers[i], s, t, resample=True)] for i, t, s in edges]
    if controls:
        edges += [(i, t, pairs.length) for i, t in targets]
        cuts += [[Resample(site, layers[i], t) for site in ("A_bar", "C")] for i, t in targets]
    metric = "logit_diff" if pairs.metric == "nld" else pairs.metric
    lost = resample_effects(model, data, cuts, metric=metric, description="token edges" if progress else None)
    if pairs.metric == "nld":
        ends = [run(model, ids, positions=pairs.last) for ids in (pairs.clean, pairs.corrupt)]
        _, spread = pairs.scale(*ends, absolute=absolute)
        lost[:, pairs.order.cpu()] /= spread.to(lost)
    scores = torch.zeros(len(layers), pairs.length, pairs.length + 1, dtype=torch.float64)
    for (i, t, s), change in zip(edges, (-lost).double().mean(1).tolist(), strict=True):
        scores[i, t, s] = change
    return scores


def attributed_tokens(
    model,
    batch: Pairs,
    layers: Sequence[int],
    alphas: list[float],
    n_rows: int,
    controls: bool,
    absolute: bool,
    note: Callable[[], object] | None,
) -> dict[str, Float[Tensor, "layers L S"]]:
    """A batch's share of the ``scores``, which are over ``n_rows`` rows; here or on a server that has gradients."""
    total = torch.zeros(len(layers), batch.length, batch.length + 1, dtype=torch.float64)
    parts = []
    for part in batch.to(model.device).batches(len(batch)):
        begins = beginning(model, part.clean, int(part.start[0]))
        clean, corrupt = (run_writes(model, ids, part, begins, layers) for ids in (part.clean, part.corrupt))
        _, spread = part.scale(clean.logits, corrupt.logits, absolute=absolute)
        spread = spread if part.metric == "nld" else torch.ones_like(spread)
        parts.append((part, begins, clean, corrupt, 1 / (spread * n_rows * len(alphas)), {}))
    for alpha in alphas:
        for part, begins, clean, corrupt, weights, gradients in parts:
            visitor = Graded(begins, layers, torch.lerp(clean.start, corrupt.start, alpha))
            with torch.enable_grad(), model.trace(part.clean[:, begins.position :]):
                found = graded(model, visitor, part, weights).save()  # pyright: ignore[reportAttributeAccessIssue]
            for layer in layers:
                gradients[layer] = gradients.get(layer, 0) + found[layer]
        if note is not None:
            note()
    for part, begins, clean, corrupt, _, gradients in parts:
        for index, layer in enumerate(layers):
            here, there, begin = clean.units[layer], corrupt.units[layer], begins.position
            gain = gradients[layer].to(here.delta).unflatten(-1, here.x.shape[2:])
            every, initial = range(part.length - begin), None if begins.states is None else begins.states[layer].ssm
            moved = contracted(here, every, gain, partial(differences, here, there))
            total[index, begin:, begin:-1] += moved.double().cpu()
            if controls:
                total[index, begin:, -1] += controls_effects(here, there, gain, initial).double().cpu()
    return {"scores": total}


def differences(here: Units, there: Units, s: slice) -> Tensor:
    """How far the writes of two runs are from each other at some positions, ``[R, S, U, P, N]``."""
    return written(there, s) - written(here, s)


class Writes(Pass):
    """Keep the scans of some layers, and the embeddings.

    Attributes:
        start: the embeddings.
        units: each layer's scan, by units.
        logits: at the position that is read.
    """

    start: Tensor
    logits: Tensor

    def __init__(self, begins: Beginning, layers: Sequence[int]) -> None:
        Pass.__init__(self, begins)
        self.layers = layers
        self.units: dict[int, Units] = {}

    def embed(self, value):
        self.start = value
        return value

    def opened(self, layer, stages):
        Pass.opened(self, layer, stages)
        if stages.KIND == "scan" and layer in self.layers:
            self.units[layer] = stages.by_unit()


def run_writes(model, tokens: Tensor, batch: Pairs, begins: Beginning, layers: Sequence[int]) -> Writes:
    """Run the model on the tokens, from where the run begins, and keep what its scans write."""
    visitor = Writes(begins, layers)
    with torch.no_grad(), model.trace(tokens[:, begins.position :]):
        found = kept(model, visitor, batch).save()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def kept(model, visitor: Writes, batch: Pairs) -> Writes:
    """The body of `run_writes`'s trace."""
    visitor.logits = run_nodes(model, visitor, batch.last)
    return visitor


class Graded(Pass):
    """Keep the gradients at the outputs of some layers' scans, in a run from other embeddings."""

    def __init__(self, begins: Beginning, layers: Sequence[int], start: Tensor) -> None:
        Pass.__init__(self, begins)
        self.layers, self.start = layers, start.detach().requires_grad_()
        self.gradients: dict[int, Tensor] = {}

    def embed(self, value):
        return self.start

    def opened(self, layer, stages):
        Pass.opened(self, layer, stages)
        if stages.KIND == "scan" and layer in self.layers:

            def keep(gradient: Tensor) -> None:
                self.gradients[layer] = gradient

            stages.peek("ssm_output").register_hook(keep)  # y and D x: the gradient is that at y


def graded(model, visitor: Graded, batch: Pairs, weights: Float[Tensor, "B"]) -> dict[int, Tensor]:
    """The body of a trace: the gradients of the metric, each row's weighted."""
    logits = run_nodes(model, visitor, batch.last)
    torch.autograd.grad((batch.value(logits) * weights).sum(), visitor.start)
    return visitor.gradients
