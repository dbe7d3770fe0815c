"""Cuts between tokens inside a scan: `Cut`, checked against the model and its prompts, as changes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from ..checks import integers
from ..trace.change import Change
from ..trace.sites import SiteInfo
from .patch import resolve
from .positions import common_positions, own_positions

if TYPE_CHECKING:
    from ..models.model import MambaModel

Sources = int | Sequence[int] | Int[Tensor, "B k"]
Targets = int | Sequence[int] | Int[Tensor, "B t"]


@dataclass(frozen=True, eq=False)
class Cut:
    """Take what some positions give to others out of a layer's scan.

    Of ``y_t = sum over s <= t of C_t (A_bar_(s+1) ... A_bar_t) w_s``, with the writes ``w_s = B_bar_s x_s``, the terms
    from the sources are taken out of the targets' y, or with ``resample`` those of the source run's writes take their
    place; delta and C stay the run's own, ``D x`` is never cut, and the y of other positions and all states stay as
    they are (of Mamba: arXiv 2505.24244).

    Sources are positions of writes: a token that the conv reads through its tap -1 is written one position later.

    Attributes:
        layer: the layer, counted from 0, or several of them; each has a scan.
        sources: the positions s: one, a list (negative: from the end), or each row's own, a LongTensor ``[B, k]``
            counted from 0, -1 for none.
        targets: the positions t, likewise. A source after a target gives it nothing.
        resample: put what the source run (``source=`` of `run`, `sweep` and `generate`) writes in the place of what is
            cut.
        conv: cut the taps of the conv that reach from a source to a target too (the terms in ``conv_slice``; of a
            position that is source and target, tap 0). Then delta, B, C and x of the target follow.
    """

    layer: int | Sequence[int]
    sources: Sources
    targets: Targets
    resample: bool = field(default=False, kw_only=True)
    conv: bool = field(default=False, kw_only=True)


def check_cut(model: MambaModel, ids: Int[Tensor, "B L"], cut: Cut, *, resampled: bool) -> list[Change]:
    """The changes that a cut makes, or a sentence that says what would be right.

    Args:
        model: the model.
        ids: the prompts.
        cut: the cut.
        resampled: whether there are source prompts.
    """
    for name in ("resample", "conv"):
        if not isinstance(getattr(cut, name), bool):
            raise ValueError(f"{name} of a cut is True or False, not {getattr(cut, name)!r}")
    if cut.resample and not resampled:
        raise ValueError("a cut with resample=True needs source tokens: give source= to run, sweep or generate")
    layers = integers(cut.layer, "layer")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"a cut names at least one layer, each once, not {cut.layer!r}")
    sites = {layer: _scan_output(model, layer) for layer in layers}
    length = ids.shape[1]
    sources, targets = (_places(ids, getattr(cut, name), name) for name in ("sources", "targets"))
    if isinstance(sources, Tensor) or isinstance(targets, Tensor):
        sources, targets = (_of_rows(places, len(ids)) for places in (sources, targets))
        if not (reach := _reached(sources, targets)).any():
            raise ValueError("a cut has no target at or after any source, in any row")
        targets = targets.where(reach, -1)
    else:
        first = min(sources)
        kept = [t for t in targets if t >= first]
        if not kept:
            raise ValueError(f"a cut has no target at or after any source: sources {sources}, targets {targets}")
        sources, targets = [s for s in sources if s <= max(kept)], kept
    value = None if cut.resample else torch.zeros(())
    changes = []
    for layer in layers:
        if cut.conv:
            for back in range(min(model.d_conv, length)):
                at = _reading(sources, targets, back)
                if at is not None:
                    zeros = value if value is None else value.expand(1, 1, 1)
                    changes.append(Change(layer, model.layer_sites(layer)["conv_slice"], zeros, at, (-1 - back,)))
        changes.append(Change(layer, sites[layer], value, targets, (), sources))
    return changes


def _scan_output(model: MambaModel, layer: int) -> SiteInfo:
    """The site y of a layer.

    Raises:
        ValueError: for a layer that is not there, or has no scan.
    """
    if model.has_scans and 0 <= layer < model.n_layers and "y" not in model.layer_sites(layer):
        raise ValueError(f"layer {layer} of {model.model_id} has no scan to cut: it is {model.layer_kinds[layer]}")
    return resolve(model, "y", layer).site


def check_new_cut(model: MambaModel, ids: Int[Tensor, "B L"], cut: Cut, new: int, *, resampled: bool) -> list[Change]:
    """The changes that a cut of new tokens makes, in positions of the whole text.

    Args:
        model: the model.
        ids: the prompts.
        cut: the cut.
        new: how many tokens are generated; the last is not read.
        resampled: whether there are source prompts.

    Raises:
        ValueError: as `check_cut`; for a target in the prompt; for what no source run has: ``resample`` of sources
            among the new tokens, or of the conv's taps.
    """
    first, whole = ids.shape[1], pad(ids, (0, new - 1))
    read = f"at positions {first} to {first + new - 2}" if new > 1 else "of which there are none"
    found = {}
    for name in ("sources", "targets"):
        places = _places(whole, getattr(cut, name), name)
        if isinstance(places, list) and (negative := [p for p in integers(getattr(cut, name)) if p < 0]):
            raise ValueError(f"{name} of a cut of new tokens are counted from 0 in the whole text, not {negative[0]}")
        found[name] = _of_rows(places, len(ids))
    sources, targets = found["sources"], found["targets"]
    if (early := targets[(targets >= 0) & (targets < first)]).numel():
        raise ValueError(f"new_patches act where new tokens are read, {read}, not at {int(early[0])}")
    if cut.resample and (late := sources[sources >= first]).numel():
        raise ValueError(f"the source {int(late[0])} cannot be resampled: the source prompts end at {first - 1}")
    if cut.resample and cut.conv:
        raise ValueError("a cut of new tokens takes conv=True without resample=True: no source run has these taps")
    return check_cut(model, whole, cut, resampled=resampled)


def cut_until(cut: Cut, rows: int, end: int) -> list[Cut]:
    """A cut of new tokens, in a text of ``end`` tokens; none where it cuts nothing yet."""
    given = (torch.as_tensor(places) for places in (cut.sources, cut.targets))
    given = (places if places.dim() == 2 else places.reshape(1, -1).expand(rows, -1) for places in given)
    sources, targets = (places.where(places < end, -1) for places in given)
    return [replace(cut, sources=sources, targets=targets)] if _reached(sources, targets).any() else []


def at_one(change: Change, position: int, number: int) -> Change | None:
    """What a change of new tokens is in a run of the token at ``position`` alone; None: nothing.

    Args:
        change: the change, in positions of the whole text.
        position: the token's.
        number: of the change, if it is a cut, which lasts.
    """
    if change.sources is not None:
        return replace(change, lasting=number)
    if isinstance(change.positions, Tensor):
        here = (change.positions == position).any(1)
        return replace(change, positions=torch.where(here, 0, -1)[:, None]) if here.any() else None
    return replace(change, positions=[0]) if position in (change.positions or ()) else None


def refuse_twice(changes: Sequence[Change]) -> None:
    """Refuse cuts of one run that cut the same source from the same target.

    Raises:
        ValueError: if two do.
    """
    cuts = [change for change in changes if change.sources is not None]
    for index, one in enumerate(cuts):
        for other in cuts[:index]:
            if one.layer == other.layer and (pair := _shared(one, other)):
                raise ValueError(
                    f"two cuts of layer {one.layer} take source {pair[0]} from target {pair[1]}: cut it once"
                )


def _shared(one: Change, other: Change) -> tuple[int, int] | None:
    """A source and a target that both cut, in some row."""
    rows = max([len(p) for c in (one, other) for p in (c.positions, c.sources) if isinstance(p, Tensor)], default=1)
    found = [[_of_rows(places, rows).tolist() for places in (c.sources, c.positions)] for c in (one, other)]
    for row in range(rows):
        (s, t), (s2, t2) = ([set(places[row]) - {-1} for places in both] for both in found)
        if pairs := [(source, target) for source in s & s2 for target in t & t2 if source <= target]:
            return min(pairs)
    return None


def _places(ids: Int[Tensor, "B L"], given, name: str) -> list[int] | Int[Tensor, "B k"]:
    """The positions, counted from 0; each row's own as a tensor."""
    if (own := own_positions(ids, given)) is not None:
        return own
    return sorted(common_positions(given, ids.shape[1], name))


def _of_rows(places, rows: int) -> Int[Tensor, "B k"]:
    """The same as each row's own."""
    return places if isinstance(places, Tensor) else torch.tensor(places).expand(rows, -1)


def _reached(sources: Int[Tensor, "B k"], targets: Int[Tensor, "B t"]) -> Tensor:
    """Which targets have a source at or before them."""
    return ((sources[:, None] >= 0) & (sources[:, None] <= targets[:, :, None])).any(2)


def _reading(sources, targets, back: int) -> list[int] | Int[Tensor, "B t"] | None:
    """The targets that read a source through the tap so many positions back; None if there is none."""
    if isinstance(targets, Tensor):
        there = ((sources[:, None] >= 0) & (sources[:, None] == targets[:, :, None] - back)).any(2)
        return targets.where(there, -1) if there.any() else None
    return [t for t in targets if t - back in sources] or None
