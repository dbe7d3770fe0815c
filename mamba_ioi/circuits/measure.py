"""Measure candidate circuits: their task metrics, many circuits in one forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..checks import whole_number
from ..memory import FLOAT, budget, fitting_rows, forward_bytes, inner_width, state_bytes, stream_bytes
from ..metrics import accuracy, kl_divergence
from ..remote.requests import ask
from ..result import Result, bootstrap_interval
from ..tasks.pairs import Metric, PromptPairs
from .circuit import Circuit
from .forward import Run, beginning, record
from .graph import Graph
from .pairs import Pairs
from .resample import BaseCircuit, resampled_logits, run_circuit

MOST_ROWS = 128
MANY = 8
"""How many candidates share a forward where there are many of them."""
REQUEST_ROWS = 4096
"""How many rows, candidates times prompts, one request to a server asks for."""


@dataclass(frozen=True)
class Measures:
    """What candidate circuits score on each row, ``[C, B]`` each.

    Attributes:
        nld: normalized logit difference: 1 as the clean run, 0 as the corrupt run.
        accuracy: 1 where the answer beats the other names of the pair.
        kl: KL(clean ‖ circuit) over the vocabulary, in nats.
        logit_diff: the clean answer's logit less the corrupt one's.
        score: the metric that was asked for, `nld` as a rule.
    """

    nld: Float[Tensor, "C B"]
    accuracy: Float[Tensor, "C B"]
    kl: Float[Tensor, "C B"]
    logit_diff: Float[Tensor, "C B"]
    score: Float[Tensor, "C B"]

    def means(self, candidate: int = 0) -> dict[str, float]:
        """One candidate's averages over rows."""
        return {name: float(getattr(self, name)[candidate].mean()) for name in ("nld", "accuracy", "kl", "logit_diff")}

    def intervals(self, candidate: int = 0) -> dict[str, float]:
        """The ends of the bootstrap 95 % intervals of one candidate's mean accuracy and NLD."""
        ends = bootstrap_interval(torch.stack([self.accuracy[candidate], self.nld[candidate]]).double().numpy())
        return {
            f"{name}_{end}": float(values[i])
            for i, name in enumerate(("accuracy", "nld"))
            for end, values in zip(("low", "high"), ends, strict=True)
        }


class Evaluator:
    """Rows of data on which circuits of one graph are measured.

    Their clean and corrupt runs are computed once where they fit into half of the memory, else for each measurement.

    Args:
        model: a model from `load_model`.
        data: pairs of prompts.
        graph: the graph; its length, if it has one, must be the prompts'.
        metric: what ``score`` measures; the pairs' own metric if None.
        absolute: whether the normalized logit difference is over |max - min| (App. B) or over max - min.
        batch_rows: how many rows, candidates times prompts, run at once; None: up to 128, as ``model.memory`` allows.
        together: how many candidates are measured together as a rule; in one forward they share what they agree on.

    Raises:
        ValueError: if graph, data and model do not fit, or the model carries edits or hooks, or has layers that read
            more than the residual stream.
    """

    def __init__(
        self,
        model,
        data: PromptPairs,
        graph: Graph,
        *,
        absolute: bool = True,
        metric: Metric | None = None,
        batch_rows: int | None = None,
        together: int = 1,
    ) -> None:
        if graph.n_layers != model.n_layers:
            raise ValueError(f"the circuit is of a model with {graph.n_layers} layers, this one has {model.n_layers}")
        graph = graph.on(model)
        model.require_stream("circuits", edges=True)
        if batch_rows is not None:
            batch_rows = whole_number(batch_rows, "batch_rows", least=1)
        pairs = Pairs.of(model, data, positional=graph.length is not None, metric=metric)
        if graph.length is not None and graph.length != pairs.length:
            raise ValueError(f"the circuit has {graph.length} positions, the prompts have {pairs.length}")
        self.model, self.graph, self.absolute = model, graph, absolute
        row = row_bytes(model, graph, pairs.length, together)
        self.batch_rows = batch_rows or fitting_rows(model, row, MOST_ROWS, share=0.5)
        self.n_rows = len(pairs)
        self.pairs, self.rows = pairs, max(1, self.batch_rows // together)
        self.runs = self.base = None
        held = len(pairs) * reference_bytes(model, graph, pairs.length)
        if model.remote is None and held <= budget(model) // 2:
            self.runs = [References.of(model, graph, batch, None) for batch in pairs.batches(self.rows)]

    def start_from(self, mask: Bool[Tensor, "n_pairs W"]) -> None:
        """Keep a circuit's run, for candidates that are like it in the edges into the first layers to go on from."""
        self.base = mask
        for batch, runs in zip(self.pairs.batches(self.rows), self.runs or (), strict=False):
            runs.base = run_circuit(self.model, self.graph, batch.clean, runs.corrupt, mask)

    def measure(self, masks: Bool[Tensor, "C n_pairs W"]) -> Measures:
        """Run candidate circuits, with everything outside each of them resampled."""
        at_once = len(masks) if self.runs is not None else max(1, REQUEST_ROWS // self.n_rows)
        pieces = [self.pairs] if self.runs is not None else list(self.pairs.chunks(REQUEST_ROWS))
        aside = self.rows, self.batch_rows, self.runs
        columns = []
        for pairs in pieces:
            parts = [
                ask(self.model, measured, self.graph, pairs, some, self.base, self.absolute, aside=aside)
                for some in masks.split(at_once)
            ]
            columns.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        place = torch.argsort(self.pairs.order).cpu()
        return Measures(
            **{name: torch.cat([column[name] for column in columns], dim=1)[:, place] for name in columns[0]}
        )


@dataclass
class References:
    """The runs that candidate circuits on a batch of prompts are made from and measured against.

    Attributes:
        corrupt: the run that resampled values come from.
        clean: the clean run's logits ``[B, V]``.
        base: a circuit's run to go on from, or None.
    """

    corrupt: Run
    clean: Tensor
    base: BaseCircuit | None

    @classmethod
    def of(cls, model, graph: Graph, batch: Pairs, base: Bool[Tensor, "n_pairs W"] | None) -> References:
        """Run them, from the position where the first row's prompts part."""
        begins = beginning(model, batch.clean, int(batch.start[0]))
        corrupt = record(model, batch.corrupt, batch.last, begins, graph=graph)
        clean = record(model, batch.clean, batch.last, begins).logits
        return cls(corrupt, clean, None if base is None else run_circuit(model, graph, batch.clean, corrupt, base))


def measured(
    model,
    graph: Graph,
    pairs: Pairs,
    masks: Bool[Tensor, "C n_pairs W"],
    base: Bool[Tensor, "n_pairs W"] | None,
    absolute: bool,
    rows: int,
    batch_rows: int,
    runs: list[References] | None,
) -> dict[str, Float[Tensor, "C B"]]:
    """`Measures` of candidate circuits by name, here or on a server, where only they leave it.

    Args:
        model: a model.
        graph: the circuits' graph.
        pairs: the prompts.
        masks: the circuits.
        base: a circuit whose run they may go on from.
        absolute: as `Evaluator` has it.
        rows: how many prompts share a forward.
        batch_rows: how many rows, candidates times prompts, run at once.
        runs: those of each batch of prompts; None to run them.
    """
    columns: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(pairs.to(model.device).batches(rows)):
        there = References.of(model, graph, batch, base) if runs is None else runs[index]
        batch = batch.to(there.clean.device)
        parts: dict[str, list[Tensor]] = {}
        for some in masks.split(max(1, batch_rows // len(batch))):
            logits = resampled_logits(model, graph, batch.clean, batch.last, there.corrupt, some[:, None], there.base)
            for name, values in task_metrics(batch, logits, there.clean, there.corrupt.logits, absolute).items():
                parts.setdefault(name, []).append(values)
        for name, values in parts.items():
            columns.setdefault(name, []).append(torch.cat(values))
    return {name: torch.cat(values, dim=1) for name, values in columns.items()}


def task_metrics(
    batch: Pairs, logits: Float[Tensor, "C B V"], clean: Tensor, corrupt: Tensor, absolute: bool
) -> dict[str, Float[Tensor, "C B"]]:
    """Each metric of [C, B, V] logits, on the CPU."""
    least, spread = batch.scale(clean, corrupt, absolute=absolute)
    found: dict[str, list[Tensor]] = {"nld": [], "accuracy": [], "kl": [], "logit_diff": [], "score": []}
    for one in logits:
        difference = batch.logit_diff(one)
        found["logit_diff"].append(difference)
        found["nld"].append((difference - least) / spread)
        found["accuracy"].append(accuracy(one, batch.answers, batch.candidates))
        found["kl"].append(kl_divergence(one, clean))
        found["score"].append(found["nld"][-1] if batch.metric == "nld" else batch.value(one))
    return {name: torch.stack(values).cpu() for name, values in found.items()}


def row_bytes(model, graph: Graph, length: int, together: int) -> int:
    """What a row, a candidate on a prompt, needs: its forward and sources, and a share of the prompt's references."""
    references = reference_bytes(model, graph, length)
    overwritten = FLOAT * model.d_inner * (2 * length + 4 * model.d_state) if graph.fine and graph.ssm != "conv" else 0
    return forward_bytes(model, length) + overwritten + _sources(model, graph, length) + references // together


def reference_bytes(model, graph: Graph, length: int) -> int:
    """What is held of a prompt: sources of the corrupt and of a base run, inner values, states where runs begin."""
    inner = FLOAT * model.n_layers * length * 4 * inner_width(model) if graph.fine else 0
    if graph.fine and graph.ssm != "conv":  # B and C beside gate, conv_input, ssm_input and delta
        inner += 2 * FLOAT * model.n_layers * length * model.sizes().get("G", 1) * model.d_state
    return 2 * _sources(model, graph, length) + inner + state_bytes(model)


def _sources(model, graph: Graph, length: int) -> int:
    """What embed and the nodes of a row add to the stream."""
    return stream_bytes(model, length) * (len(graph.nodes) + 1) // (model.n_layers + 1)


def graph_for(circuit: Circuit, data: PromptPairs, model, ssm: str | None = None) -> Graph:
    """The circuit's graph, with as many positions as the prompts have, and ``ssm`` as given or else its own."""
    if not isinstance(circuit, Circuit):
        hint = "; minimal_circuit makes one of scores" if isinstance(circuit, Result) else ""
        raise ValueError(f"a circuit is a Circuit, not {type(circuit).__name__}{hint}")
    ssm = circuit.ssm if ssm is None else ssm
    if circuit.fine and "tokens" in (ssm, circuit.ssm) and ssm != circuit.ssm:
        raise ValueError(
            f"the circuit has ssm={circuit.ssm!r}, and other edges into its SSMs than ssm={ssm!r}: find one with that"
        )
    graph = replace(circuit.graph, ssm=ssm).on(model)
    if circuit.length is None:
        return graph
    length = Pairs.of(model, data, positional=True).length
    if circuit.length > length:
        raise ValueError(f"the circuit has {circuit.length} positions, the prompts have {length}")
    return replace(graph, length=length)
