"""Direct effects: what each write to the residual stream adds to the logit difference, on no way but the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..interventions.attention import attention_contributed, find_attention
from ..interventions.lens import EMBED, Direction, linear_readout
from ..interventions.patch import resolve
from ..interventions.plan import Plan, read_sites
from ..interventions.token_to_token import attention_bytes, contributed, projection, refuse_other_sums
from ..memory import FLOAT, fitting_rows, forward_bytes
from ..models.model import CausalLM
from ..remote.requests import ask
from ..result import Result
from ..tasks.pairs import PromptPairs
from .common import check_data, check_layers, mean_with_interval

if TYPE_CHECKING:
    from ..trace.attention import AttentionPath

BY = {"layer": [], "token": ["source"], "channel": ["channel"]}
"""How writes are told apart, and the column for it."""
PARTS = {"out_proj": "mixer", "attn_out": "attn", "mlp_out": "mlp"}
"""What a block's parts are called, by the site of what they add to the stream."""
WHOLE = -1
"""The channel of what is not told apart by channels."""


def direct_effects(
    model: CausalLM,
    pairs: PromptPairs,
    by: Literal["layer", "token", "channel"] = "layer",
    *,
    layers: Sequence[int] | int | None = None,
) -> Result:
    """What each write adds to the logit difference at the clean prompts' last position.

    The residual stream at the last position is the sum of what the embeddings and the layers' parts write there. The
    final norm's scale is taken as it is in the run, so that the logit difference is a sum over the writes (direct logit
    attribution; Elhage et al. 2021). What later layers make of a write is no part of its effect. A model that caps its
    logits is looked at before that.

    Args:
        model: any causal language model whose blocks pass on a residual stream.
        pairs: pairs of prompts.
        by: ``"layer"``: each part's write; ``"token"``: a mixer's by the position of its scan that it comes from, an
            attention's by the position of the value (see `token_contributions`), all else by the last position, where
            it is computed; ``"channel"``: a mixer's by the channel of ``after_skip``, all else whole.
        layers: the layers that are told apart by token or channel, and the others are not; all if None.

    Returns:
        A row for each write: ``layer`` (-1: outside the layers), ``part`` (``embed``, ``mixer``, ``attn``, ``mlp``;
        ``layer`` for a block whose parts are not known; ``bias`` for what the final norm and the unembedding add of
        themselves), ``source`` (a position) or ``channel`` (-1: all of them), ``effect`` (mean over all rows; 0 where a
        row has no such source), ``low`` and ``high`` (its bootstrap 95 % interval; not by channel), ``n`` (rows). The
        effects add up to the mean logit difference, ``meta["logit_diff"]``.

    Raises:
        ValueError: for another ``by``, an attention by token that is none of those that `token_contributions` takes
            apart, a model that carries edits or hooks, or one whose logits are no linear function of what is written.
    """
    if by not in BY:
        raise ValueError(f"by is one of {', '.join(BY)}, not {by!r}")
    check_data(model, pairs)
    model.require_stream("direct effects")
    apart = [] if by == "layer" else check_layers(model, layers)
    if by == "layer" and layers is not None:
        raise ValueError(f"layers={layers!r} are those told apart by token or channel, and by is 'layer'")
    attentions = [layer for layer in apart if by == "token" and "attn_out" in model.sites_of(layer)]
    for layer in attentions:
        find_attention(model, layer)
    length = pairs.clean_tokens.shape[1]
    row = forward_bytes(model, length) + 4 * FLOAT * length * model.d_model
    row += attention_bytes(model, length) if attentions else 0
    parts = torch.arange(len(pairs)).split(fitting_rows(model, row, 256, share=0.5))
    ends = [ask(model, read_stream, pairs.clean_tokens[rows], pairs.last_position[rows, None]) for rows in parts]
    direction = linear_readout(model, torch.cat([end["stream"].cpu() for end in ends]), *_weights(pairs))
    found: dict[tuple, Float[Tensor, "B"]] = {}
    for rows in parts:
        _add_effects(model, pairs, rows, by, apart, direction, found)
    effects = torch.stack([*found.values()])
    table = pd.DataFrame([*found], columns=["layer", "part", *BY[by]])
    if by == "channel":
        table["effect"] = effects.double().mean(1).numpy()
    else:
        table["effect"], table["low"], table["high"] = mean_with_interval(effects)
    table["n"] = len(pairs)
    arguments = {"rows": len(pairs), "by": by} | ({} if by == "layer" else {"layers": apart})
    difference = float(direction.logit_diff.double().mean())
    return Result.create("direct_effects", table, model=model, arguments=arguments, logit_diff=difference)


def _add_effects(
    model: CausalLM,
    pairs: PromptPairs,
    rows: Int[Tensor, "R"],
    by: str,
    apart: Sequence[int],
    direction: Direction,
    found: dict[tuple, Float[Tensor, "B"]],
) -> None:
    """Put the effects of some rows' writes among those of all rows."""
    ids, last, toward = pairs.clean_tokens[rows], pairs.last_position[rows].cpu(), direction.of_stream[rows]

    def add(name: tuple, effect: Float[Tensor, "R"]) -> None:
        found.setdefault(name, torch.zeros(len(pairs)))[rows] = effect.cpu().float()

    def add_whole(name: tuple, effect: Float[Tensor, "R"]) -> None:
        if by == "token":
            for position in set(last.tolist()):
                add((*name, position), effect.where(last == position, 0.0))
        else:
            add((*name, WHOLE) if by == "channel" else name, effect)

    writes: list[tuple[int, str, str]] = [(EMBED, "embed", "")]
    for layer in range(model.n_layers):
        there = [name for name in PARTS if name in model.sites_of(layer)]
        writes += [(layer, PARTS[name], name) for name in there] or [(layer, "layer", "")]
    given = [(layer, site) for layer, _, site in writes]
    values = ask(model, written, ids, given, last[:, None], toward)["effects"].cpu()
    for (layer, part, site), value in zip(writes, values, strict=True):
        if layer not in apart or site not in ("out_proj", *(["attn_out"] if by == "token" else [])):
            add_whole((layer, part), value)
            continue
        if site == "attn_out":
            path = find_attention(model, layer)
            answer = ask(model, by_value, ids, layer, path, last[:, None], toward)
            refuse_other_sums(model, layer, float(answer["off"]))
        else:
            answer = ask(model, by_token if by == "token" else by_channel, ids, layer, last[:, None], toward)
        each = answer["effects"]
        labels = [*range(each.shape[1])] if by == "token" else [*range(each.shape[1] - 1), WHOLE]
        for label, effect in zip(labels, each.T, strict=True):
            add((layer, part, label), effect)
    add_whole((EMBED, "bias"), direction.constant[rows])


def _weights(pairs: PromptPairs) -> tuple[Int[Tensor, "U"], Float[Tensor, "R U"]]:
    """The tokens that some row's logit difference is made of, and their weights in each row."""
    right, wrong = (ids.cpu() for ids in pairs.answer_sets)
    tokens = torch.cat([right.flatten(), wrong.flatten()]).unique()
    tokens = tokens[tokens >= 0]
    one, other = ((ids[:, :, None] == tokens).sum(1) / (ids >= 0).sum(1, keepdim=True) for ids in (right, wrong))
    return tokens, one - other


def read_stream(model, ids: Int[Tensor, "B L"], at: Int[Tensor, "B 1"]) -> dict[str, Float[Tensor, "B D"]]:
    """The residual stream after the last layer at one position a row, here or on a server."""
    ids = model.to_tokens(ids)[0]
    ref = resolve(model, "resid_post", model.n_layers - 1)
    return {"stream": read_sites(model, ids, Plan.make(model, ids, (), [ref], at.to(ids.device)))[ref.key][:, 0]}


def written(
    model,
    ids: Int[Tensor, "B L"],
    writes: Sequence[tuple[int, str]],
    at: Int[Tensor, "B 1"],
    toward: Float[Tensor, "B D"],
) -> dict[str, Float[Tensor, "W B"]]:
    """How far each write goes in a direction, here or on a server.

    Args:
        model: the model.
        ids: the prompts.
        writes: layer and site; the site is empty for what the whole layer adds, or for the stream before the first.
        at: the position of each row.
        toward: the direction of each row.
    """
    ids = model.to_tokens(ids)[0]
    refs = {}
    for layer, site in writes:
        if site:
            refs[layer, site] = resolve(model, site, layer)
        else:
            refs[layer, "before"] = resolve(model, "resid_pre", max(layer, 0))
            refs[layer, "after"] = resolve(model, "resid_post", max(layer, 0))
    found = read_sites(model, ids, Plan.make(model, ids, (), [*refs.values()], at.to(ids.device)))
    effects = []
    for layer, site in writes:
        if site:
            value = found[refs[layer, site].key]
        elif layer < 0:
            value = found[refs[layer, "before"].key]
        else:
            value = found[refs[layer, "after"].key] - found[refs[layer, "before"].key]
        effects.append((value[:, 0].double() * toward.to(value.device, torch.float64)).sum(1))
    return {"effects": torch.stack(effects).float()}


def by_token(
    model, ids: Int[Tensor, "B L"], layer: int, at: Int[Tensor, "B 1"], toward: Float[Tensor, "B D"]
) -> dict[str, Float[Tensor, "B L"]]:
    """How far each source of a mixer's write goes in a direction, here or on a server."""
    ids = model.to_tokens(ids)[0]
    value = contributed(model, ids, layer, at.to(ids.device))["contributions"][:, 0]
    return {"effects": torch.einsum("bld,bd->bl", value, toward.to(value))}


def by_value(
    model,
    ids: Int[Tensor, "B L"],
    layer: int,
    path: AttentionPath,
    at: Int[Tensor, "B 1"],
    toward: Float[Tensor, "B D"],
) -> dict[str, Tensor]:
    """How far each source of an attention's write goes in a direction, and how far ``off`` they are from the whole."""
    ids = model.to_tokens(ids)[0]
    found = attention_contributed(model, ids, layer, path, at.to(ids.device))
    value = found["contributions"][:, 0]
    return {"effects": torch.einsum("bld,bd->bl", value, toward.to(value)), "off": found["off"]}


def by_channel(
    model, ids: Int[Tensor, "B L"], layer: int, at: Int[Tensor, "B 1"], toward: Float[Tensor, "B D"]
) -> dict[str, Float[Tensor, "B _"]]:
    """How far each channel of a mixer's write goes in a direction, and last out_proj's bias; here or on a server."""
    ids = model.to_tokens(ids)[0]
    ref = resolve(model, "after_skip", layer)
    value = read_sites(model, ids, Plan.make(model, ids, (), [ref], at.to(ids.device)))[ref.key][:, 0]
    weight, bias = projection(model, ids, layer, value.dtype)
    toward = toward.to(value)
    return {"effects": torch.cat([value * (toward @ weight.T), toward @ bias[:, None]], dim=1)}
