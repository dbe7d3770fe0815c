"""What the residual stream says of the answer, by the model's own final norm and unembedding.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..memory import FLOAT, fitting_rows
from ..remote.requests import ask
from ..trace.anatomy import output_logits, skip_block
from .patch import resolve
from .plan import Plan, read_sites

if TYPE_CHECKING:
    from ..models.model import CausalLM

EMBED = -1
"""What is called a layer before the first: the residual stream that layer 0 begins with."""
_LARGE = 1e4
"""What makes a norm's epsilon too small to matter, and can be squared in float32."""


def end_with(model, stream: Float[Tensor, "R D"]) -> None:
    """In a trace of ``[R, 1]`` tokens: run no layer; ``stream`` is the residual stream after the last."""
    for layer in range(model.n_layers):
        skip_block(model, layer, stream[:, None].to(model.layers[layer].input))


def unembedded(model, stream: Float[Tensor, "R D"]) -> Tensor:
    """The body of a trace: the logits ``[R, V]`` of a residual stream after the last layer."""
    end_with(model, stream)
    return output_logits(model)[:, 0]


def stream_logits(model, stream: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
    """The logits of a residual stream after the last layer, by the model's own norm, unembedding and what follows."""
    ids = torch.zeros(len(stream), 1, dtype=torch.long, device=stream.device)
    with torch.no_grad(), model.trace(ids):
        logits = unembedded(model, stream).save()  # pyright: ignore[reportAttributeAccessIssue]
    return logits


def lens_logits(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    layers: Sequence[int],
    at: Int[Tensor, "B k"],
    wanted: Int[Tensor, "B K"],
    answers: Int[Tensor, "B A"],
) -> tuple[Float[Tensor, "S B k K"], Int[Tensor, "S B k"]]:
    """The logit lens: logits of some tokens from the residual stream after each layer, at some positions.

    Args:
        model: any causal language model.
        tokens: the prompts.
        layers: the layers, ``EMBED`` for what layer 0 begins with.
        at: the positions of each row.
        wanted: the tokens whose logits are wanted, of each row.
        answers: the right tokens of each row, padded with -1.

    Returns:
        Their logits on the CPU, and the rank of the best of the answers in the vocabulary: 1 is the highest logit.
    """
    most = fitting_rows(model, 3 * FLOAT * model.vocab_size, 1024, share=0.5)
    row = FLOAT * len(layers) * at.shape[1] * model.d_model
    rows = fitting_rows(model, row + 8 * FLOAT * tokens.shape[1] * model.d_model, 256, share=0.5)
    logits, ranks = [], []
    for part in torch.arange(len(tokens)).split(rows):
        given = tokens[part], list(layers), at[part], wanted[part], answers[part]
        found = ask(model, lensed, *given, aside=(most,))
        logits.append(found["logits"].cpu())
        ranks.append(found["ranks"].cpu())
    return torch.cat(logits, dim=1), torch.cat(ranks, dim=1)


def lensed(
    model,
    ids: Int[Tensor, "B L"],
    layers: Sequence[int],
    at: Int[Tensor, "B k"],
    wanted: Int[Tensor, "B K"],
    answers: Int[Tensor, "B A"],
    most: int,
) -> dict[str, Tensor]:
    """`lens_logits` of some rows, here or on a server; ``most`` rows are unembedded at once."""
    ids = model.to_tokens(ids)[0]
    refs = [
        resolve(model, "resid_pre", 0) if layer == EMBED else resolve(model, "resid_post", layer) for layer in layers
    ]
    found = read_sites(model, ids, Plan.make(model, ids, (), refs, at.to(ids.device)))
    stream = torch.stack([found[ref.key] for ref in refs])
    shape = stream.shape[:3]
    tokens, right = (
        some.to(stream.device)[None, :, None].expand(*shape, -1).flatten(0, 2) for some in (wanted, answers)
    )
    picked, ranks = [], []
    for part in torch.arange(shape.numel(), device=stream.device).split(most):
        logits = stream_logits(model, stream.flatten(0, 2)[part])
        best = logits.gather(1, right[part].clamp(min=0)).masked_fill(right[part] < 0, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (logits > best).sum(1))
        picked.append(logits.gather(1, tokens[part]))
    return {"logits": torch.cat(picked).unflatten(0, shape), "ranks": torch.cat(ranks).unflatten(0, shape)}


@dataclass(frozen=True)
class Direction:
    """Each row's logit difference as a linear function of the residual stream after the last layer.

    Attributes:
        of_stream: what the stream is multiplied by, ``[B, D]``: the final norm's scale is that of the run.
        constant: what the norm and the unembedding add of themselves, ``[B]``.
        logit_diff: the run's own logit difference, ``[B]``; of a model that caps its logits, before that.
    """

    of_stream: Float[Tensor, "B D"]
    constant: Float[Tensor, "B"]
    logit_diff: Float[Tensor, "B"]


def linear_readout(
    model: CausalLM,
    stream: Float[Tensor, "B D"],
    tokens: Int[Tensor, "U"],
    right: Float[Tensor, "B U"],
) -> Direction:
    """How a weighted sum of logits, such as a logit difference, depends on the stream, with the norm's scale frozen.

    A norm is ``A v / s(v) + b`` with ``s`` the root mean square of v or of v less its mean; its A and b, and the
    unembedding's, are read off what it makes of each basis vector. No weight is read.

    Args:
        model: any causal language model.
        stream: the residual stream after the last layer, at the positions that are read.
        tokens: the tokens of which some row needs the logit.
        right: their weights in each row.

    Raises:
        ValueError: if the model is not of that form.
    """
    D, dtype, own_dtype = stream.shape[1], torch.float64, stream.dtype
    right, tolerance = right.to(dtype), max(1e-3, 20 * torch.finfo(own_dtype).eps)
    ones = torch.ones(1, D)
    probes = torch.cat([torch.eye(D), 0 * ones, ones, torch.eye(D)[:1] / 2]).to(own_dtype) * _LARGE
    most = fitting_rows(model, 3 * FLOAT * model.vocab_size, 512, share=0.5)
    found = ask(model, read_off, torch.cat([probes, stream.cpu()]), tokens, aside=(most,))
    stream = stream.to("cpu", dtype)
    normed, columns, heads, logits = (found[name].to("cpu", dtype) for name in ("normed", "columns", "heads", "logits"))
    b, head_bias, U = normed[D], columns[-1], columns[:-1] - columns[-1]
    own, logits, given = (values[len(probes) :] for values in (heads, logits, normed - b))
    made, ones, half = (some - b for some in (normed[:D], normed[D + 1], normed[D + 2]))
    if (half - made[0]).norm() < 1e-2 * made[0].norm():  # a norm: what it makes does not grow with what it is given
        centred = bool(ones.norm() < 1e-2 * made.norm())
        A = made * ((1 / D - 1 / D**2) ** 0.5 if centred else (1 / D) ** 0.5)
    else:
        A = made / _LARGE
    linear = stream @ A
    scale = (linear * given).sum(1) / (linear * linear).sum(1).clamp(min=1e-300)
    times = (logits * own).sum() / (own * own).sum().clamp(min=1e-300)
    if (logits - times * own).norm() > tolerance * logits.norm():
        times = torch.ones((), dtype=dtype)  # a soft cap: what is before it
    weights = right @ U.T
    direction = times * scale[:, None] * (weights @ A.T)
    constant = times * (weights @ b + right @ head_bias)
    value = times * (own * right).sum(1)
    wrong = ((direction * stream).sum(1) + constant - value).abs()
    size = (direction * stream).abs().sum(1) + constant.abs()
    if not bool((wrong <= tolerance * size + 1e-6).all()):
        raise ValueError(
            f"the logits of {model.model_id} are no linear function of its residual stream with the final norm's scale "
            "frozen: its final norm is neither an RMSNorm nor a LayerNorm"
        )
    return Direction(direction.float(), constant.float(), value.float())


def read_off(model, stream: Float[Tensor, "P D"], tokens: Int[Tensor, "U"], most: int) -> dict[str, Tensor]:
    """What the norm and the unembedding make of vectors, here or on a server.

    Returns:
        ``normed [P, H]``: what the unembedding is given for each; ``heads`` and ``logits`` ``[P, U]``: what it gives
        for some tokens, and what the model's output is there; ``columns [H + 1, U]``: what it gives for each basis
        vector, and for zeros.
    """
    stream, tokens = stream.to(model.device), tokens.to(model.device)
    normed, heads, logits, columns = [], [], [], []
    for some in stream.split(most):
        ids = torch.zeros(len(some), 1, dtype=torch.long, device=model.device)
        with torch.no_grad(), model.trace(ids):
            found = probed(model, some, None).save()  # pyright: ignore[reportAttributeAccessIssue]
        normed.append(found[0])
        heads.append(found[1][:, tokens])
        logits.append(found[2][:, tokens])
    width = normed[0].shape[1]
    for some in torch.eye(width + 1, width, device=model.device).split(most):
        ids = torch.zeros(len(some), 1, dtype=torch.long, device=model.device)
        with torch.no_grad(), model.trace(ids):
            found = probed(model, stream[:1].expand(len(some), -1), some).save()  # pyright: ignore[reportAttributeAccessIssue]
        columns.append(found[1][:, tokens])
    named = {"normed": normed, "heads": heads, "logits": logits, "columns": columns}
    return {name: torch.cat(values) for name, values in named.items()}


def probed(model, stream: Float[Tensor, "P D"], given: Float[Tensor, "P H"] | None) -> list[Tensor]:
    """The body of a trace: what the unembedding is given and gives, and the logits; ``given``: it is given that."""
    end_with(model, stream)
    head = model.unembedding
    value = head.input
    before = value[:, 0].clone()
    if given is not None:
        head.input = given[:, None].to(value)
    return [before, head.output[:, 0].clone(), output_logits(model)[:, 0]]
