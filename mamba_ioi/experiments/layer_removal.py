"""Figure 5: zero-ablate what whole layers add to the residual stream, one at a time and one after another.

Works on any causal language model: a block that adds nothing gives its input as its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..interventions.readout import Readout
from ..memory import fitting_rows, forward_bytes, stream_bytes
from ..models.model import CausalLM
from ..remote.requests import ask
from ..result import Result
from ..tasks.pairs import PromptPairs
from ..trace.anatomy import put_output, skip_block, stream_of
from ..trace.walk import Visitor, logits_at, walk
from .common import best_run, candidate_scores, check_data, mean_with_interval

PROMPTS_AT_ONCE = 64
ROWS_AT_ONCE = 256
MINIMAL_IMPACT = 0.05
"""How much accuracy may fall for `greedy_layer_removal` to count layers as removed "with minimal impact"."""


def layer_removal(model: CausalLM, data: PromptPairs, *, progress: bool = True) -> Result:
    """Remove each layer in turn and see whether the model still answers (paper, Section 4.1.2).

    Args:
        model: any causal language model.
        data: pairs of prompts; they need not be aligned.
        progress: show a bar.

    Returns:
        A row for each layer, the first being layer -1, none removed: ``probability`` (mean probability of the answer
        among the pair's candidates), ``low`` and ``high`` (its bootstrap 95 % interval), ``accuracy``,
        ``accuracy_low``, ``accuracy_high``, ``n`` (rows).

    Raises:
        ValueError: if the data are empty, or the model carries edits or hooks, or passes more from layer to layer than
            a residual stream.
    """
    check_data(model, data)
    layers = list(range(model.n_layers))
    readout = Readout.of(data)
    with tqdm(total=len(data) * len(layers), desc="layer removal", disable=not progress) as bar:
        logits = logits_without(model, data.clean_tokens, readout, (), layers, bar=bar)
    table = pd.DataFrame({"layer": [-1, *layers]} | _score_columns(*candidate_scores(logits, readout)))
    return Result.create("layer_removal", table, model=model, arguments={"rows": len(data)})


def greedy_layer_removal(model: CausalLM, data: PromptPairs, *, progress: bool = True) -> Result:
    """Remove layer after layer, each time the one whose removal leaves the highest accuracy, until none is left.

    Of layers that leave the same accuracy, the one that leaves the higher mean probability of the answer goes first;
    of those, the lowest (paper, Section 4.1.2).

    Args:
        model: any causal language model.
        data: pairs of prompts; they need not be aligned.
        progress: show a bar.

    Returns:
        A row for each step, step 0 (layer -1) being the intact model: ``layer`` (removed at this step, in addition to
        those before), ``accuracy``, ``probability``, their bootstrap 95 % intervals (``accuracy_low``,
        ``accuracy_high``, ``low``, ``high``) and ``n`` (rows). ``meta["removable"]`` is how many layers go before
        accuracy is first more than 0.05 below the intact model's.

    Raises:
        ValueError: if the data are empty, or the model carries edits or hooks, or passes more from layer to layer than
            a residual stream.
    """
    check_data(model, data)
    readout = Readout.of(data)
    removed: list[int] = []
    kept = []
    rounds = model.n_layers
    with tqdm(total=len(data) * rounds * (rounds + 1) // 2, desc="greedy removal", disable=not progress) as bar:
        for _ in range(rounds):
            left = [layer for layer in range(rounds) if layer not in removed]
            logits = logits_without(model, data.clean_tokens, readout, removed, left, bar=bar)
            accuracies, probabilities = candidate_scores(logits, readout)
            if not removed:
                kept.append((accuracies[0], probabilities[0]))
            best = best_run(accuracies[1:], probabilities[1:])
            kept.append((accuracies[1 + best], probabilities[1 + best]))
            removed.append(left[best])
    accuracies, probabilities = (torch.stack(column) for column in zip(*kept, strict=True))
    table = pd.DataFrame(
        {"step": range(rounds + 1), "layer": [-1, *removed]} | _score_columns(accuracies, probabilities)
    )
    fallen = (table["accuracy"] < table["accuracy"][0] - MINIMAL_IMPACT).tolist()
    removable = (fallen.index(True) if any(fallen) else len(fallen)) - 1
    return Result.create("greedy_layer_removal", table, model=model, arguments={"rows": len(data)}, removable=removable)


def _score_columns(accuracies: Float[Tensor, "I B"], probabilities: Float[Tensor, "I B"]) -> dict:
    probability, low, high = mean_with_interval(probabilities)
    accuracy, accuracy_low, accuracy_high = mean_with_interval(accuracies)
    return {
        "accuracy": accuracy,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "probability": probability,
        "low": low,
        "high": high,
        "n": accuracies.shape[1],
    }


def logits_without(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    readout: Readout,
    removed: Sequence[int],
    candidates: Sequence[int],
    *,
    bar: tqdm | None = None,
) -> Float[Tensor, "runs B K"]:
    """The readout's logits with the layers of ``removed`` zero-ablated, alone and with each candidate in addition.

    The candidates share the layers below them: their runs start from the residual stream that the run without any
    candidate had there, several candidates as one batch.

    Returns:
        Logits on the CPU; first the run without a candidate, then one for each candidate.
    """
    model.require_stream("effects of removed layers")
    results = torch.empty(len(candidates) + 1, *readout.tokens.shape, dtype=torch.float32)
    order = sorted(candidates)
    runs = [0] + [1 + candidates.index(layer) for layer in order]
    length = tokens.shape[1]
    prompts = fitting_rows(model, stream_bytes(model, length), PROMPTS_AT_ONCE, share=0.5)
    most = fitting_rows(model, forward_bytes(model, length), ROWS_AT_ONCE, share=0.5)
    note = bar.update if bar is not None and model.remote is None else None
    for rows in torch.arange(len(tokens)).split(min(prompts, most)):
        arguments = tokens[rows], readout.last[rows], readout.tokens[rows], list(removed), order
        found = ask(model, run_without_each, *arguments, aside=(most, note))["logits"]
        results[torch.tensor(runs)[:, None], rows] = found.cpu()
        if bar is not None and note is None:
            bar.update(len(rows) * len(order))
    return results


def run_without_each(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    last: Int[Tensor, "B"],
    wanted: Int[Tensor, "B K"],
    removed: Sequence[int],
    order: Sequence[int],
    most: int,
    note: Callable[[int], object] | None,
) -> dict[str, Float[Tensor, "..."]]:
    """`logits_without` on a few prompts, here or on a server: ``logits`` [len(order) + 1, B, K].

    Args:
        model: the model.
        tokens: the prompts.
        last: each prompt's last position.
        wanted: the tokens whose logits to read.
        removed: layers to leave out in all runs.
        order: the candidates, ascending.
        most: how many rows to run at once.
        note: called with the number of rows that were run.
    """
    ids = model.to_tokens(tokens)[0]
    last, wanted = last.to(ids.device), wanted.cpu()
    logits, inputs = _run_without(model, ids, last, removed, (), None, save=order)
    found = [logits[0].gather(1, wanted)]
    at_once = max(1, most // len(ids))
    for start in range(0, len(order), at_once):
        chunk = order[start : start + at_once]
        logits, _ = _run_without(model, ids, last, removed, chunk, inputs[chunk[0]])
        found += [run.gather(1, wanted) for run in logits]
        if note is not None:
            note(len(ids) * len(chunk))
    return {"logits": torch.stack(found)}


class Removing(Visitor):
    """Leave layers out, in all batches or in one.

    Args:
        removed: layers to leave out in all batches.
        own: the layer that each batch leaves out in addition, and the batch's rows.
        stream: the residual stream before layer ``first``, from where the run starts; None to start at layer 0.
        first: that layer.
        save: layers whose input to keep.
    """

    def __init__(
        self, removed: Sequence[int], own: dict[int, slice], stream: Tensor | None, first: int, save: Sequence[int]
    ) -> None:
        Visitor.__init__(self)
        self.removed, self.own, self.stream, self.first, self.save = removed, own, stream, first, save
        self.inputs: dict[int, Tensor] = {}
        self.before: Tensor = torch.empty(0)

    def enter(self, model, layer):
        if layer < self.first and self.stream is not None:
            skip_block(model, layer, self.stream)
            return False
        given = self.stream if layer == self.first and self.stream is not None else None
        self.before = model.layers[layer].input if given is None else given
        if layer in self.save:
            self.inputs[layer] = self.before
        if layer in self.removed or (layer in self.own and len(self.own) == 1):
            skip_block(model, layer, self.before)
            return False
        return True

    def leave(self, model, layer):
        if layer in self.own:
            block, rows = model.layers[layer], self.own[layer]
            after = stream_of(block.output).clone()
            after[rows] = self.before[rows].to(after.dtype)
            put_output(block, after)


def _run_without(
    model: CausalLM,
    ids: Int[Tensor, "B L"],
    last: Int[Tensor, "B"],
    removed: Sequence[int],
    candidates: Sequence[int],
    start: Float[Tensor, "B L D"] | None,
    save: Sequence[int] = (),
) -> tuple[list[Float[Tensor, "B V"]], dict[int, Tensor]]:
    """One trace over a batch for each candidate (or one batch, without): logits at the last positions.

    Args:
        model: the model.
        ids: the prompts, once.
        last: each prompt's last position.
        removed: layers to leave out in all batches.
        candidates: ascending; the layer that each batch leaves out in addition.
        start: the residual stream before the first candidate, from where the run starts; None to start at layer 0.
        save: layers whose input to return as well.
    """
    batches, size = max(1, len(candidates)), len(ids)
    first = candidates[0] if start is not None else 0
    own = {layer: slice(size * index, size * (index + 1)) for index, layer in enumerate(candidates)}
    stream = None if start is None else start.repeat(batches, 1, 1)
    read = last.repeat(batches)
    inputs: dict[int, Tensor] = {}
    with torch.no_grad(), model.trace(ids.repeat(batches, 1)):
        visitor = Removing(removed, own, stream, first, save)
        walk(model, visitor)
        logits = logits_at(model, read).save()  # pyright: ignore[reportAttributeAccessIssue]
        inputs = visitor.inputs.save()  # pyright: ignore[reportAttributeAccessIssue]
    return list(logits.cpu().float().split(size)), inputs
