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
from ..trace.anatomy import put_output, skip_block, stream_of
from ..trace.state import LayerState
from ..trace.walk import Visitor, logits_at, walk


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
    """

    resid: Tensor
    own_input: Tensor
    shape: torch.Size

    def __init__(self, begins: Beginning) -> None:
        Visitor.__init__(self, begins.states)
        self.begins = begins

    def embed(self, value: Tensor) -> Tensor:
        """The embedding as the residual stream begins with it, ``[B, L, D]``."""
        return value

    def into(self, layer: int, resid: Tensor) -> Tensor:
        """The input of a layer (n_layers: of the output node), given the residual stream there."""
        return resid

    def skipped(self, layer: int) -> bool:
        """Whether the layer need not run, because `after` does not need what it adds."""
        return False

    def after(self, layer: int, resid: Tensor, added) -> Tensor:
        """The residual stream after a layer that adds ``added`` (None if it was skipped)."""
        return resid + added

    def enter(self, model, layer):
        block = model.layers[layer]
        if layer == 0:
            first = block.input
            self.resid = self.embed(first.to(torch.promote_types(first.dtype, torch.float32)))
        if self.skipped(layer):
            skip_block(model, layer, block.input)
            self.resid = self.after(layer, self.resid, None)
            return False
        value = self.into(layer, self.resid)
        self.shape, flat = value.shape[:-2], value.flatten(0, -3)
        if model.all_scans:
            args, kwargs = block.inputs
            block.inputs = ((flat, *args[1:]), {**kwargs, "attention_mask": None})
        else:
            self.own_input = flat.to(block.input.dtype)
            block.input = self.own_input
        return True

    def leave(self, model, layer):
        block = model.layers[layer]
        if model.all_scans:
            added = block.mixer.out_proj.output.to(self.resid.dtype)
        else:
            added = stream_of(block.output).to(self.resid.dtype) - self.own_input.to(self.resid.dtype)
        self.resid = self.after(layer, self.resid, added.unflatten(0, self.shape))


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
    final = visitor.into(model.n_layers, visitor.resid).flatten(0, -3)
    rows = torch.arange(final.shape[0], device=final.device)
    final = final[rows, read.repeat(final.shape[0] // read.shape[0])]
    put_output(model.layers[model.n_layers - 1], final[:, None].expand(-1, length, -1))
    return logits_at(model, torch.zeros_like(rows))


@dataclass(frozen=True)
class Run:
    """What every node gave in one run, at the positions from where it began.

    Attributes:
        begins: where that is.
        sources: what embed and each layer add to the residual stream, n_layers + 1 times ``[B, L, D]``.
        inner: for each layer, the values of its inner nodes, ``[B, L, E]`` each: ``conv_input`` (in_proj's conv
            branch) and ``gate``; for the edge conv -> ssm also ``conv`` and ``ssm_output``, or what the states follow
            from, ``ssm_input``, ``delta`` and ``B`` ``[B, L, N]``, or for edges from token to token these, ``C``, as
            ``B``, and ``ssm_output``. Of a Mamba-2 ``conv_input`` and ``conv`` are ``[B, L, X]``, ``delta``
            ``[B, L, H]`` and ``B`` ``[B, L, G, N]``. Empty if not asked for.
        logits: at each row's read position, ``[B, V]``.
        ssm: which of these was asked for, as `graph` has it.
    """

    begins: Beginning
    sources: list[Float[Tensor, "B L D"]]
    inner: list[dict[str, Float[Tensor, "B L E"]]]
    logits: Float[Tensor, "B V"]
    ssm: str = "conv"


class Record(Pass):
    """Keep what every node gives; inside layers if ``fine``, there what ``ssm`` says (see `graph`)."""

    def __init__(self, begins: Beginning, fine: bool, ssm: str = "conv") -> None:
        Pass.__init__(self, begins)
        self.fine, self.ssm = fine, ssm
        self.sources: list[Tensor] = []
        self.inner: list[dict[str, Tensor]] = []
        self.values: dict[str, Tensor] = {}

    def embed(self, value):
        self.sources.append(value)
        return value

    def at(self, model, layer, site):
        if self.fine and site.name == "skip":
            self.values = {"gate": model.layers[layer].mixer.gate}

    def opened(self, layer, stages):
        Pass.opened(self, layer, stages)
        if not self.fine:
            return
        if stages.KIND == "conv":
            self.values["conv_input"] = stages.x.transpose(1, 2)
            if self.ssm == "conv":
                self.values["conv"] = stages.peek("conv")
            return
        if self.ssm != "states":
            self.values["ssm_output"] = stages.peek("ssm_output")
        if self.ssm != "conv":
            self.values |= stages.inflow() if self.ssm == "states" else stages.flow()
        self.inner.append(self.values)

    def after(self, layer, resid, added):
        self.sources.append(added)
        return resid + added


def record(
    model,
    tokens: Int[Tensor, "B L"],
    read: Int[Tensor, "B"],
    begins: Beginning | None = None,
    *,
    fine: bool = False,
    ssm: str = "conv",
) -> Run:
    """Run the model on the tokens, from where the run begins, and keep what every node gives (see `Record`)."""
    if fine:
        require_fine(model)
    visitor = Record(begins or Beginning(), fine, ssm)
    with torch.no_grad(), model.trace(tokens[:, visitor.begins.position :]):
        found = recorded(model, visitor, read).save()  # pyright: ignore[reportAttributeAccessIssue]
    return Run(visitor.begins, *found, ssm=ssm)


def recorded(model, visitor: Record, read: Tensor) -> tuple:
    """The body of `record`'s trace."""
    logits = run_nodes(model, visitor, read)
    return visitor.sources, visitor.inner, logits


def require_fine(model) -> None:
    """Refuse fine nodes where there are none.

    Raises:
        ValueError: if the model is no Mamba, or its layers are more than a scan's mixer.
    """
    model.require_mamba("edges inside a layer")
    if not model.all_scans:
        kinds = ", ".join(dict.fromkeys(model.layer_kinds))
        raise ValueError(
            f"edges inside a layer need layers that are a scan's mixer alone; {model.model_id} has {kinds}: leave fine "
            f"out, and each layer is one node"
        )
