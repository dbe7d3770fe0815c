"""Runs through the residual stream, node by node, and the record of what every node gives.

One nnsight trace is one run: the residual stream is carried along outside the model, each block is given its own input,
and what the block adds is read off. A `Pass` says what happens at each node: nothing, edges are resampled (`resample`),
or gradients are taken (`eap`).

What runs in a trace is plain torch at module level, so that it can be shipped to a server.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..interventions.batches import run_prefix
from ..trace.anatomy import given_embeddings, put_output, skip_block, stream_of
from ..trace.state import LayerState
from ..trace.walk import Visitor, logits_at, walk
from .graph import ATTN, MIXER, MLP, Graph

SITES_OF_PARTS = {MIXER: ("layer_input", "out_proj"), ATTN: ("attn_in", "attn_out"), MLP: ("mlp_in", "mlp_out")}
"""Where a part reads the residual stream, its own copy, and what it adds."""


@dataclass(frozen=True)
class Beginning:
    """Where runs of some prompts begin.

    Attributes:
        position: the first position that is run.
        states: what the positions before leave behind in each layer, for each prompt; None at position 0.
    """

    position: int = 0
    states: list[LayerState] | None = None


def beginning(model, tokens: Int[Tensor, "B L"], position: int) -> Beginning:
    """Run the positions of a Mamba's prompts before ``position``."""
    return Beginning(position, run_prefix(model, tokens[:, :position], None)) if position else Beginning()


class Pass(Visitor):
    """What a run does at each node. This one changes nothing; the others change what they say.

    It carries the residual stream itself, in float32 at least, and may hand on more rows than the trace began with (a
    Mamba's only), each block of ``B`` rows the same prompts again.

    Args:
        begins: where the run begins; the values at its nodes are those from there on.
        graph: whose nodes there are; None for one a layer.
    """

    resid: Tensor
    own_input: Tensor
    shape: torch.Size
    start: Tensor

    def __init__(self, begins: Beginning, graph: Graph | None = None) -> None:
        Visitor.__init__(self, begins.states)
        self.begins = begins
        self.parts = None if graph is None or not graph.parts else numbered_parts(graph)
        self.inputs: dict[int, Tensor] = {}

    def embed(self, value: Tensor) -> Tensor:
        """The embedding as the residual stream begins with it, ``[B, L, D]``."""
        return value

    def into(self, node: int, resid: Tensor) -> Tensor:
        """The input of a node, which is a layer or a part (after them: of the output node), given the stream there."""
        return resid

    def beside(self, node: int) -> Tensor:
        """The embedding that a layer is given beside the stream (Zamba2)."""
        return self.start

    def skipped(self, node: int) -> bool:
        """Whether the node need not run, because `after` does not need what it adds."""
        return False

    def after(self, node: int, resid: Tensor, added) -> Tensor:
        """The residual stream after a node that adds ``added`` (None if it was skipped)."""
        return resid + added

    def enter(self, model, layer):
        block = model.layers[layer]
        if layer == 0:
            first = block.input
            self.start = self.resid = self.embed(first.to(torch.promote_types(first.dtype, torch.float32)))
        nodes = [layer] if self.parts is None else [number for group in self.parts[layer] for number, *_ in group]
        if all(self.skipped(node) for node in nodes):
            skip_block(model, layer, block.input)
            for node in nodes:
                self.resid = self.after(node, self.resid, None)
            return False
        if self.parts is not None:
            return True
        value = self.into(layer, self.resid)
        self.shape, flat = value.shape[:-2], value.flatten(0, -3)
        if model.all_scans:
            args, kwargs = block.inputs
            block.inputs = ((flat, *args[1:]), {**kwargs, "attention_mask": None})
        elif given_embeddings(block):
            args, kwargs = block.inputs
            self.own_input = flat.to(args[0].dtype)
            block.inputs = (self.own_input, self.beside(layer).flatten(0, -3).to(args[1].dtype), *args[2:]), kwargs
        else:
            self.own_input = flat.to(block.input.dtype)
            block.input = self.own_input
        return True

    def at(self, model, layer, site):
        if self.parts is None or layer is None:
            return
        block = model.layers[layer]
        for group in self.parts[layer]:
            for number, reads, adds in group:
                if site.name == reads:
                    if number == group[0][0]:  # those side by side read the same stream
                        self.inputs = {node: self.into(node, self.resid) for node, *_ in group}
                    self.shape = self.inputs[number].shape[:-2]
                    setattr(block, reads, self.inputs[number].flatten(0, -3))
                elif site.name == adds:
                    added = getattr(block, adds).to(self.resid.dtype)
                    self.resid = self.after(number, self.resid, added.unflatten(0, self.shape))

    def leave(self, model, layer):
        if self.parts is not None:
            return
        block = model.layers[layer]
        if model.all_scans:
            added = block.mixer.out_proj.output.to(self.resid.dtype)
        else:
            added = stream_of(block.output).to(self.resid.dtype) - self.own_input.to(self.resid.dtype)
        self.resid = self.after(layer, self.resid, added.unflatten(0, self.shape))


def numbered_parts(graph: Graph) -> list[list[list[tuple[int, str, str]]]]:
    """Of each block's parts, group by group, the number of the node, and the sites where it reads and adds."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    return [
        [[(numbers[f"{layer}{end}"], *SITES_OF_PARTS[end]) for end in group] for group in block]
        for layer, block in enumerate(graph.blocks)
    ]


def run_nodes(model, visitor: Pass, read: Int[Tensor, "B"]) -> Float[Tensor, "rows V"]:
    """The body of a trace: run the model node by node.

    Args:
        model: a `CausalLM`, in a trace of the positions from where the visitor begins.
        visitor: what to do at each node.
        read: the position of the prompt to read logits at, per prompt.

    Returns:
        The logits, ``[rows, V]``.
    """
    length = model.layers[0].input.shape[1]
    walk(model, visitor)
    read = read - visitor.begins.position
    last = model.n_layers if visitor.parts is None else sum(len(group) for block in visitor.parts for group in block)
    final = visitor.into(last, visitor.resid).flatten(0, -3)
    rows = torch.arange(final.shape[0], device=final.device)
    final = final[rows, read.repeat(final.shape[0] // read.shape[0])]
    put_output(model.layers[model.n_layers - 1], final[:, None].expand(-1, length, -1))
    return logits_at(model, torch.zeros_like(rows))


@dataclass(frozen=True)
class Run:
    """What every node gave in one run, at the positions from where it began.

    Attributes:
        begins: where that is.
        sources: what embed and each node add to the residual stream, ``[B, L, D]`` each.
        inner: for each layer with a mixer, the values of its inner nodes, ``[B, L, E]`` each: ``conv_input`` (the conv
            branch of in_proj) and ``gate``; for the edge conv -> ssm also ``conv`` and ``ssm_output``, or what the
            states follow from, ``ssm_input``, ``delta`` and ``B`` ``[B, L, N]``, or for edges from token to token
            these, ``C``, as ``B``, and ``ssm_output``. Of a Mamba-2 ``conv_input`` and ``conv`` are ``[B, L, X]``,
            ``delta`` ``[B, L, H]`` and ``B`` ``[B, L, G, N]``. Empty if not asked for.
        logits: at each row's read position, ``[B, V]``.
        ssm: which of these was asked for, as `graph` has it.
    """

    begins: Beginning
    sources: list[Float[Tensor, "B L D"]]
    inner: dict[int, dict[str, Float[Tensor, "B L E"]]]
    logits: Float[Tensor, "B V"]
    ssm: str = "conv"


class Record(Pass):
    """Keep what every node of a graph gives."""

    def __init__(self, begins: Beginning, graph: Graph | None = None) -> None:
        Pass.__init__(self, begins, graph)
        self.fine, self.ssm = graph is not None and graph.fine, "conv" if graph is None else graph.ssm
        self.sources: list[Tensor] = []
        self.inner: dict[int, dict[str, Tensor]] = {}

    def embed(self, value):
        self.sources.append(value)
        return value

    def at(self, model, layer, site):
        Pass.at(self, model, layer, site)
        if self.fine and site.name == "skip":
            self.inner[layer] = {"gate": model.layers[layer].mixer.gate}

    def opened(self, layer, stages):
        Pass.opened(self, layer, stages)
        if not self.fine:
            return
        values = self.inner[layer]
        if stages.KIND == "conv":
            values["conv_input"] = stages.x.transpose(1, 2)
            if self.ssm == "conv":
                values["conv"] = stages.peek("conv")
            return
        if self.ssm != "states":
            values["ssm_output"] = stages.peek("ssm_output")
        if self.ssm != "conv":
            values |= stages.inflow() if self.ssm == "states" else stages.flow()

    def after(self, layer, resid, added):
        self.sources.append(added)
        return resid + added


def record(
    model,
    tokens: Int[Tensor, "B L"],
    read: Int[Tensor, "B"],
    begins: Beginning | None = None,
    *,
    graph: Graph | None = None,
) -> Run:
    """Run the model on the tokens, from where the run begins, and keep what every node of the graph gives.

    Without a graph these are the layers.
    """
    visitor = Record(begins or Beginning(), None if graph is None else graph.on(model))
    with torch.no_grad(), model.trace(tokens[:, visitor.begins.position :]):
        found = recorded(model, visitor, read).save()  # pyright: ignore[reportAttributeAccessIssue]
    return Run(visitor.begins, *found, ssm="conv" if graph is None else graph.ssm)


def recorded(model, visitor: Record, read: Tensor) -> tuple:
    """The body of `record`'s trace."""
    logits = run_nodes(model, visitor, read)
    return visitor.sources, visitor.inner, logits
