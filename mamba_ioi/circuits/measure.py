"""Measure candidate circuits: their task metrics, many circuits in one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import metrics
from ..dataset import IOIDataset
from ..result import bootstrap_interval
from .circuit import Circuit
from .forward import Run, record, require_fine
from .graph import Graph
from .pairs import Pairs
from .resample import resampled_logits

BATCH_ROWS = 128
MANY = 8
"""How many candidates share a forward where there are many of them."""


@dataclass(frozen=True)
class Measures:
    """What candidate circuits score on each row, ``[C, B]`` each.

    Attributes:
        nld: normalized logit difference: 1 as the clean run, 0 as the corrupt run.
        accuracy: 1 where the answer beats the other names of the pair.
        kl: KL(clean ‖ circuit) over the vocabulary, in nats.
        logit_diff: the clean answer's logit less the corrupt one's.
    """

    nld: Float[Tensor, "C B"]
    accuracy: Float[Tensor, "C B"]
    kl: Float[Tensor, "C B"]
    logit_diff: Float[Tensor, "C B"]

    def means(self, candidate: int = 0) -> dict[str, float]:
        """One candidate's averages over rows."""
        return {name: float(getattr(self, name)[candidate].mean()) for name in self.__dataclass_fields__}

    def intervals(self, candidate: int = 0) -> dict[str, float]:
        """The ends of the bootstrap 95 % intervals of one candidate's mean accuracy and NLD."""
        ends = bootstrap_interval(torch.stack([self.accuracy[candidate], self.nld[candidate]]).double().numpy())
        return {
            f"{name}_{end}": float(values[i])
            for i, name in enumerate(("accuracy", "nld"))
            for end, values in zip(("low", "high"), ends, strict=True)
        }


class Bench:
    """Rows of data on which circuits of one graph are measured. Their clean and corrupt runs are computed once.

    Args:
        model: a model from `load_model`.
        data: pairs of prompts.
        graph: the graph; its length, if it has one, must be the prompts'.
        absolute: whether the normalized logit difference is over |max - min| (App. B) or over max - min.
        batch_rows: how many rows, candidates times prompts, run at once.
        together: how many candidates are measured together as a rule; in one forward they share what they agree on.
    """

    def __init__(
        self,
        model,
        data: IOIDataset,
        graph: Graph,
        *,
        absolute: bool = True,
        batch_rows: int = BATCH_ROWS,
        together: int = 1,
    ) -> None:
        if graph.n_layers != model.n_layers:
            raise ValueError(f"the circuit is of a model with {graph.n_layers} layers, this one has {model.n_layers}")
        if graph.fine:
            require_fine(model)
        if batch_rows < 1:
            raise ValueError(f"batch_rows is at least 1, not {batch_rows}")
        pairs = Pairs.of(model, data, positional=graph.length is not None)
        if graph.length is not None and graph.length != pairs.length:
            raise ValueError(f"the circuit has {graph.length} positions, the prompts have {pairs.length}")
        self.model, self.graph, self.absolute, self.batch_rows = model, graph, absolute, batch_rows
        self.n_rows = len(pairs)
        self.batches: list[tuple[Pairs, Run, Tensor]] = []
        for batch in pairs.batches(max(1, batch_rows // together)):
            corrupt = record(model, batch.corrupt, batch.last, fine=graph.fine)
            clean = record(model, batch.clean, batch.last).logits
            self.batches.append((batch, corrupt, clean))

    def measure(self, masks: Bool[Tensor, "C n_pairs W"]) -> Measures:
        """Run candidate circuits, with everything outside each of them resampled."""
        columns: dict[str, list[Tensor]] = {name: [] for name in Measures.__dataclass_fields__}
        for batch, corrupt, clean in self.batches:
            at_once = max(1, self.batch_rows // len(batch))
            parts: dict[str, list[Tensor]] = {name: [] for name in columns}
            for some in masks.split(at_once):
                logits = resampled_logits(self.model, self.graph, batch.clean, batch.last, corrupt, some[:, None])
                for name, values in self._metrics(batch, logits, clean, corrupt.logits).items():
                    parts[name].append(values)
            for name, values in parts.items():
                columns[name].append(torch.cat(values))
        return Measures(**{name: torch.cat(values, dim=1) for name, values in columns.items()})

    def _metrics(self, batch: Pairs, logits: Tensor, clean: Tensor, corrupt: Tensor) -> dict[str, Tensor]:
        """Each metric of [C, B, V] logits, ``[C, B]`` on the CPU."""
        least, spread = batch.scale(clean, corrupt, absolute=self.absolute)
        found: dict[str, list[Tensor]] = {name: [] for name in Measures.__dataclass_fields__}
        for one in logits:
            difference = batch.logit_diff(one)
            found["logit_diff"].append(difference)
            found["nld"].append((difference - least) / spread)
            found["accuracy"].append(metrics.accuracy(one, batch.answers, batch.candidates))
            found["kl"].append(metrics.kl_divergence(one, clean))
        return {name: torch.stack(values).cpu() for name, values in found.items()}


def graph_for(circuit: Circuit, data: IOIDataset, model) -> Graph:
    """The circuit's graph, with as many positions as the prompts have."""
    if circuit.length is None:
        return circuit.graph
    length = Pairs.of(model, data, positional=True).length
    if circuit.length > length:
        raise ValueError(f"the circuit has {circuit.length} positions, the prompts have {length}")
    return Graph(circuit.n_layers, circuit.fine, length)
