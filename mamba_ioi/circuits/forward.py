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

from ..interventions.continuation import States, carry
from ..trace.anatomy import cut_head, output_logits, put_output, skip_block, stream_of
from ..trace.conv import ConvStages
from ..trace.location import take_over
from ..trace.s6 import ScanStages


@dataclass(frozen=True)
class Beginning:
    """Where runs of some prompts begin.

    Attributes:
        position: the first position that is run.
        states: what the positions before leave behind in each layer, for each prompt; None at position 0.
    """

    position: int = 0
    states: States | None = None


def beginning(model, tokens: Int[Tensor, "B L"], position: int) -> Beginning:
    """Run the positions of a Mamba's prompts before ``position``."""
    if not position:
        return Beginning()
    return Beginning(position, carry(model, tokens[:, :position], [(None, None)] * model.n_layers))


class Pass:
    """What a run does at each node. This one changes nothing; the others change what they say.

    Args:
        begins: where the run begins; the values at its nodes are those from there on.
    """

    def __init__(self, begins: Beginning) -> None:
        self.begins = begins

    def embed(self, value: Tensor) -> Tensor:
        """The embedding as the residual stream begins with it, ``[B, L, D]``."""
        return value

    def enter(self, layer: int, resid: Tensor) -> Tensor:
        """The input of a layer (n_layers: of the output node), given the residual stream there."""
        return resid

    def inside(self, layer: int, mixer) -> None:
        """What to do in a Mamba layer, between its input projection and its output projection: at least `conv`."""
        self.conv(layer, mixer)

    def conv(self, layer: int, mixer) -> ConvStages:
        """Open the layer's conv, which goes on from where the run begins."""
        conv = take_over(mixer, ConvStages)
        conv.before = self._left(layer, 1, conv.x)
        return conv

    def scan(self, layer: int, mixer) -> ScanStages:
        """Open the layer's scan, which goes on from where the run begins."""
        scan = take_over(mixer, ScanStages)
        scan.initial = self._left(layer, 0, scan.x)
        return scan

    def _left(self, layer: int, which: int, x: Tensor) -> Tensor | None:
        """What earlier positions left in a layer, for each row of its input ``x``."""
        if self.begins.states is None:
            return None
        left = self.begins.states[layer][which]
        return None if left is None else left.repeat(len(x) // len(left), 1, 1)

    def skipped(self, layer: int) -> bool:
        """Whether the layer need not run, because `leave` does not need what it adds."""
        return False

    def leave(self, layer: int, resid: Tensor, added) -> Tensor:
        """The residual stream after a layer that adds ``added`` (None if it was skipped)."""
        return resid + added


def stream(model, visitor: Pass, read: Int[Tensor, "B"]) -> Float[Tensor, "rows V"]:
    """The body of a trace: run the model node by node.

    Args:
        model: a `CausalLM`, in a trace of the positions from where the visitor begins.
        visitor: what to do at each node. It may hand on more rows than the trace began with (a Mamba's only), each
            block of ``B`` rows the same prompts again.
        read: the position of the prompt to read logits at, per prompt.

    Returns:
        The logits, ``[rows, V]``.
    """
    read = read - visitor.begins.position
    blocks = model.layers
    first = blocks[0].input
    length = first.shape[1]
    resid = visitor.embed(first.to(torch.promote_types(first.dtype, torch.float32)))
    for layer in range(model.n_layers):
        block = blocks[layer]
        if visitor.skipped(layer):
            skip_block(model, layer, block.input)
            resid = visitor.leave(layer, resid, None)
            continue
        value = visitor.enter(layer, resid)
        if model.has_scans:
            args, kwargs = block.inputs
            block.inputs = ((value.flatten(0, -3), *args[1:]), {**kwargs, "attention_mask": None})
            visitor.inside(layer, block.mixer)
            visitor.scan(layer, block.mixer)
            added = block.mixer.out_proj.output
        else:
            flat = value.flatten(0, -3).to(block.input.dtype)
            block.input = flat
            added = stream_of(block.output).to(resid.dtype) - flat.to(resid.dtype)
        resid = visitor.leave(layer, resid, added.to(resid.dtype).unflatten(0, value.shape[:-2]))
    final = visitor.enter(model.n_layers, resid).flatten(0, -3)
    rows = torch.arange(final.shape[0], device=final.device)
    final = final[rows, read.repeat(final.shape[0] // read.shape[0])]
    put_output(blocks[model.n_layers - 1], final[:, None].expand(-1, length, -1))
    cut_head(model)
    return output_logits(model)[:, 0]


@dataclass(frozen=True)
class Run:
    """What every node gave in one run, at the positions from where it began.

    Attributes:
        begins: where that is.
        sources: what embed and each layer add to the residual stream, n_layers + 1 times ``[B, L, D]``.
        inner: for each layer, the values of its inner nodes, ``[B, L, E]`` each: ``conv_input`` (in_proj's conv
            branch) and ``gate``; for the edge conv -> ssm also ``conv`` and ``ssm_output``, or what the states follow
            from, ``ssm_input``, ``delta`` and ``B`` ``[B, L, N]``. Empty if not asked for.
        logits: at each row's read position, ``[B, V]``.
    """

    begins: Beginning
    sources: list[Float[Tensor, "B L D"]]
    inner: list[dict[str, Float[Tensor, "B L E"]]]
    logits: Float[Tensor, "B V"]


class Record(Pass):
    """Keep what every node gives; inside layers if ``fine``, there what ``ssm`` says (see `graph`)."""

    def __init__(self, begins: Beginning, fine: bool, ssm: str = "conv") -> None:
        Pass.__init__(self, begins)
        self.fine, self.ssm = fine, ssm
        self.sources: list[Tensor] = []
        self.inner: list[dict[str, Tensor]] = []

    def embed(self, value):
        self.sources.append(value)
        return value

    def inside(self, layer, mixer):
        if not self.fine:
            self.conv(layer, mixer)
            return
        gate = mixer.gate
        conv = self.conv(layer, mixer)
        values = {"gate": gate, "conv_input": conv.x.transpose(1, 2)}
        if self.ssm == "conv":
            values["conv"] = conv.peek("conv")
        scan = self.scan(layer, mixer)
        if self.ssm == "conv":
            values["ssm_output"] = scan.peek("ssm_output")
        else:
            values |= {"ssm_input": scan.x, "delta": scan.peek("delta"), "B": scan.B.clone()}
        self.inner.append(values)

    def leave(self, layer, resid, added):
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
    return Run(visitor.begins, *found)


def recorded(model, visitor: Record, read: Tensor) -> tuple:
    """The body of `record`'s trace."""
    logits = stream(model, visitor, read)
    return visitor.sources, visitor.inner, logits


def require_fine(model) -> None:
    """Refuse fine nodes where there are none.

    Raises:
        ValueError: if the model is no Mamba, or its conv has not four taps.
    """
    model.require_mamba("edges inside a layer")
    if model.d_conv != 4:
        raise ValueError(f"edges inside a layer are those of a conv with 4 taps, not {model.d_conv}")
