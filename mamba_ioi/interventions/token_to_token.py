"""What a scan or an attention moves from token to token: its matrix, and what each source adds to the stream.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import integers
from ..memory import FLOAT, fitting_rows, forward_bytes
from ..remote.requests import ask
from ..trace.change import look_at
from ..trace.mixing import contributions, mean_mixing, unit_mixing
from ..trace.sites import owner
from ..trace.walk import Visitor, each_alone, leave_out, walk, weight_and_bias
from .attention import attention_contributed, attention_pattern, find_attention
from .patch import resolve
from .positions import kept_positions, refuse_ends, refuse_padding
from .run import Tokens

if TYPE_CHECKING:
    from ..models.model import MambaModel
    from ..trace.attention import AttentionPath

Part = Literal["scan", "attention"]

_TINY = 1e-6
"""What stands for a zero where a factor is read off a product, relative to the others: its square adds nothing."""


def hidden_attention(
    model: MambaModel,
    tokens: Tokens,
    layer: int,
    *,
    reduce: Literal["mean"] | None = "mean",
    units: Sequence[int] | int | None = None,
    targets: int | Sequence[int] | Int[Tensor, "B T"] | None = None,
    part: Part = "scan",
) -> Float[Tensor, "B T L"] | Float[Tensor, "B U T L"]:
    """The scan of a layer as a matrix between tokens: ``alpha[t, s] = C_t (A_bar_(s+1) ... A_bar_t) B_bar_s``.

    A scan's output is ``y_t = sum over s <= t of alpha[t, s] x_s``, in each unit: a channel of S6 (E of them), a head
    of SSD (H) (arXiv 2403.01590, equation 9; 2405.21060, section 2). A source s is a position of the scan's input: a
    token that the conv reads through its tap -1 is written one position later.

    With ``part="attention"``, the pattern of a layer's attention, of which the units are its heads: a head's output is
    ``z_t = sum over s <= t of pattern[t, s] v_s``, with the values v_s.

    Args:
        model: a model from `load_model`; for ``part="attention"`` a hybrid or a transformer.
        tokens: token ids ``[B, L]``, a text, or texts (padded on the right).
        layer: a layer with a scan, or with an attention, counted from 0.
        reduce: ``"mean"``: over the units; None: each unit's own.
        units: which units, counted from 0; None for all.
        targets: the positions t: one, a list (negative: from the end), or each row's own, ``[B, T]``; None for all.
        part: which part of the layer, ``"scan"`` or ``"attention"``.

    Returns:
        ``[B, T, L]``, or with ``reduce=None`` ``[B, U, T, L]``; 0 where s is after t. On the model's device, in the
        precision of the scan, or for an attention in float32 at least.

    Raises:
        ValueError: for a layer without that part, a unit or position that is not there, a position where one of the
            texts has ended, a model that carries edits or hooks, or an attention that does not call transformers'
            attention function.
    """
    if reduce not in ("mean", None):
        raise ValueError(f"reduce is 'mean' or None, not {reduce!r}")
    path, ids, at = _checked(model, tokens, layer, targets, part)
    count = model.sizes()[model.layer_sites(layer)["delta"].shape[-1]] if path is None else heads_of(model)
    chosen = None if units is None else integers(units, "unit")
    if chosen is not None and not (chosen and all(0 <= unit < count for unit in chosen)):
        raise ValueError(f"units of layer {layer} are 0 to {count - 1}, at least one of them, not {units!r}")
    row = FLOAT * at.shape[1] * ids.shape[1] * (1 if reduce else len(chosen or range(count)))
    found = []
    for rows in _parts(model, ids, row + (0 if path is None else attention_bytes(model, ids.shape[1]))):
        if path is None:
            found.append(ask(model, mixing, ids[rows], layer, reduce, chosen, at[rows])["alpha"])
        else:
            given = ids[rows], layer, path, reduce, chosen, at[rows]
            found.append(ask(model, attention_pattern, *given)["alpha"])
    return _joined(found)


def token_contributions(
    model: MambaModel,
    tokens: Tokens,
    layer: int,
    *,
    targets: int | Sequence[int] | Int[Tensor, "B T"] | None = None,
    part: Part = "scan",
) -> Float[Tensor, "B T L D"]:
    """What each source position adds to the residual stream at each target, through a layer's scan, gate and out_proj.

    The sum over sources is the site ``out_proj`` at the target. The way that is not through the scan, ``D x``, and
    out_proj's bias count with the source that is the target. The gate is the target's own; so is the scale of a norm
    after it (Mamba-2), which is taken as it is in the run.

    With ``part="attention"``, what each source adds through the pattern and the values of a layer's attention and its
    output projection: the sum over sources is the site ``attn_out``. The projection's bias counts with the target; the
    scale of a norm that follows is taken as it is in the run.

    Args:
        model: a model from `load_model`; for ``part="attention"`` a hybrid or a transformer.
        tokens: token ids ``[B, L]``, a text, or texts (padded on the right).
        layer: a layer with a scan, or with an attention, counted from 0.
        targets: the positions t: one, a list (negative: from the end), or each row's own, ``[B, T]``; None for all.
        part: which part of the layer, ``"scan"`` or ``"attention"``.

    Returns:
        ``[B, T, L, D]``; 0 where the source is after the target.

    Raises:
        ValueError: as `hidden_attention`; and for an attention whose output is no such sum, as it is gated.
    """
    path, ids, at = _checked(model, tokens, layer, targets, part)
    row = FLOAT * at.shape[1] * ids.shape[1] * model.d_model
    if path is None:
        parts = _parts(model, ids, row)
        return _joined([ask(model, contributed, ids[part], layer, at[part])["contributions"] for part in parts])
    found = []
    for rows in _parts(model, ids, row + attention_bytes(model, ids.shape[1])):
        one = ask(model, attention_contributed, ids[rows], layer, path, at[rows])
        refuse_other_sums(model, layer, float(one["off"]))
        found.append(one["contributions"])
    return _joined(found)


def refuse_other_sums(model: MambaModel, layer: int, off: float) -> None:
    """Refuse an attention whose output is not the sum of its values by its pattern, as it is gated.

    Raises:
        ValueError: if the two are further apart than roundings take them.
    """
    if not off <= 10 * torch.finfo(model.dtype).eps ** 0.5:
        raise ValueError(
            f"what the attention of layer {layer} of {model.model_id} adds to the stream is not the sum of its "
            f"values by its pattern: it differs by {off:.2g} of the largest value"
        )


def _checked(
    model: MambaModel, tokens: Tokens, layer: int, targets, part: Part
) -> tuple[AttentionPath | None, Int[Tensor, "B L"], Int[Tensor, "B T"]]:
    """Where the attention is (None: the scan is asked for), the token ids, and each row's targets."""
    if part not in ("scan", "attention"):
        raise ValueError(f"part is 'scan' or 'attention', not {part!r}")
    resolve(model, "resid_pre", layer)
    sites = model.layer_sites(layer)
    if part == "scan" and "write" not in sites and "attn_out" in sites:
        raise ValueError(f"layer {layer} of {model.model_id} has no scan; give part='attention' for its attention")
    if part == "scan":
        resolve(model, "write", layer)
    model.require_stream("tokens' contributions")
    path = find_attention(model, layer) if part == "attention" else None
    return path, *_ids_and_targets(model, tokens, targets)


def _ids_and_targets(model: MambaModel, tokens: Tokens, targets) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B T"]]:
    """The token ids, and each row's targets."""
    ids, last = model.to_tokens(tokens)
    if targets is None:
        return ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    at = kept_positions(ids, targets)
    refuse_ends(last, [targets])
    refuse_padding(last, at)
    return ids, at


def _parts(model: MambaModel, ids: Int[Tensor, "B L"], row: int) -> list[slice]:
    """The rows to work on at once, each of which has a result of so many bytes."""
    rows = fitting_rows(model, forward_bytes(model, ids.shape[1]) + 2 * row, len(ids))
    return [slice(start, min(start + rows, len(ids))) for start in range(0, len(ids), rows)]


def heads_of(model) -> int:
    """How many heads an attention of the model has."""
    return model._module.config.get_text_config().num_attention_heads


def attention_bytes(model, length: int) -> int:
    """What a row's patterns take, the values that they are read off with, and each head's part of the stream."""
    return FLOAT * heads_of(model) * length * (3 * length + model.d_model)


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts; those of one part are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mixing(
    model,
    ids: Int[Tensor, "B L"],
    layer: int,
    reduce: str | None,
    units: Sequence[int] | None,
    targets: Int[Tensor, "B T"],
) -> dict[str, Tensor]:
    """`hidden_attention` of some rows, here or on a server."""
    scan = look_into(model, ids, layer).units
    scan = scan if units is None else scan.of(units)
    union = sorted(set(targets.flatten().tolist()))
    alpha = mean_mixing(scan, union) if reduce else unit_mixing(scan, union)
    return {"alpha": _at_targets(alpha, union, targets, 1 if reduce else 2)}


def contributed(
    model, ids: Int[Tensor, "B L"], layer: int, targets: Int[Tensor, "B T"]
) -> dict[str, Float[Tensor, "B T L D"]]:
    """`token_contributions` of some rows, here or on a server."""
    seen = look_into(model, ids, layer)
    weight, bias = projection(model, ids, layer, seen.gain.dtype)
    union = sorted(set(targets.flatten().tolist()))
    found = contributions(seen.units, union, seen.gain[:, union], weight)
    own = torch.arange(len(union), device=found.device), torch.tensor(union, device=found.device)
    found[:, own[0], own[1]] += (seen.direct * seen.gain)[:, union] @ weight + bias
    return {"contributions": _at_targets(found, union, targets, 1)}


def _at_targets(values: Tensor, union: list[int], targets: Int[Tensor, "B T"], axis: int) -> Tensor:
    """Each row's values at its own targets, of those at all that some row has."""
    if targets[0].tolist() == union and bool((targets == targets[0]).all()):
        return values
    place = torch.searchsorted(torch.tensor(union, device=values.device), targets.to(values.device))
    return torch.stack([value.index_select(axis - 1, own) for value, own in zip(values, place, strict=True)])


class Inside(Visitor):
    """See a layer's scan by units, and what becomes of its output before out_proj.

    Attributes:
        units: the scan.
        direct: what the scan's output has beside y, ``[B, L, E]``: D x.
        gain: the factor of each channel of the scan's output in what out_proj receives, ``[B, L, E]``.
    """

    units: Any
    direct: Tensor
    gain: Tensor

    def __init__(self, layer: int) -> None:
        Visitor.__init__(self)
        self.layer = layer

    def opened(self, layer, stages):
        Visitor.opened(self, layer, stages)
        if layer == self.layer and stages.KIND == "scan":
            self.units, self.direct = stages.by_unit(), stages.peek("ssm_output") - stages.peek("y")

    def at(self, model, layer, site):
        if layer != self.layer:
            return
        if site.name == "ssm_output":  # what is small is made a little larger, so that its factor can be told
            value = owner(model, site, layer).ssm_output
            least = _TINY * value.pow(2).mean(-1, keepdim=True).sqrt()
            least = torch.where(least > 0, least, 1.0)
            value.copy_(torch.where(value.abs() < least, least, value))
            self.output = value.clone()
        if site.name == "after_skip":
            self.gain = look_at(owner(model, site, layer), site).to(self.output) / self.output


def look_into(model, ids: Int[Tensor, "B L"], layer: int) -> Inside:
    """A layer's scan in a run of the tokens, which ends there."""
    with torch.no_grad(), model.trace(ids):
        seen = looked_into(model, layer).save()  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def looked_into(model, layer: int) -> Inside:
    """The body of `look_into`'s trace."""
    visitor = Inside(layer)
    walk(model, visitor, stop=layer + 1)
    leave_out(model, layer + 1)
    return visitor


def projection(
    model, ids: Int[Tensor, "B L"], layer: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "C D"], Float[Tensor, "D"]]:
    """What each channel of a mixer's output adds to the stream, and what is added beside; no weight is read."""
    with torch.no_grad(), model.trace(ids[:1, :1]):
        alone = projected(model, layer).save()  # pyright: ignore[reportAttributeAccessIssue]
    return weight_and_bias(alone, dtype)


def projected(model, layer: int) -> Float[Tensor, "_ D"]:
    """The body of its trace: what each channel alone, and none, adds."""
    return each_alone(model, layer, model.layers[layer].mixer.out_proj) * model.layers[layer].mixer_scale
