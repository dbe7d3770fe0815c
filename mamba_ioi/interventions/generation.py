"""Greedy generation with changes: of the prompt, whose effects last through the states, and of each new token.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..checks import integers, whole_number
from ..remote.requests import ask
from ..trace.change import Change, Prefix
from ..trace.state import LayerState
from ..trace.walk import walk
from .cut import Cut, at_one, check_new_cut, cut_until, refuse_twice
from .patch import Patch, check_patch, resolve
from .plan import Plan, source_values, unembed
from .run import Tokens, row_parts, run, source_tokens

if TYPE_CHECKING:
    from ..models.model import MambaModel


def generate(
    model: MambaModel,
    tokens: Tokens,
    max_new_tokens: int,
    *,
    patches: Sequence[Patch | Cut] = (),
    new_patches: Sequence[Patch | Cut] = (),
    source: Tokens | None = None,
) -> Int[Tensor, "B M"]:
    """The prompts and the tokens that follow, each the most likely one; an end-of-text token does not end them.

    As many rows run at once as ``model.memory`` allows, all of them where a value is a callable.

    Every token is read once: the states that the positions before it left are gone on from, so what a patch changes
    lasts. The result is that of running the growing text anew at every step with the same changes.

    Args:
        model: a Mamba from `load_model`.
        tokens: token ids ``[B, L]``, a text, or texts of one length in tokens.
        max_new_tokens: how many tokens to add (T).
        patches: what to change while the prompt is read; a `Cut` acts on its targets there.
        new_patches: what to change while the new tokens are read, one at a time. The last of them is not read, so the
            positions are L to L + T - 2, counted from 0 as in the whole text; None is all of them, and ``h_start`` is
            the state before the token. A callable sees the site at one position, ``[B, 1, ...]``. A `Cut` has its
            targets there, and its sources anywhere before them, in the prompt too.
        source: the prompts that a `Cut` with ``resample=True`` takes the writes of, row for row and of one shape.

    Raises:
        ValueError: for texts of several lengths, a number of tokens below 1, a patch that does not fit, or source
            prompts of another shape; for a cut of new tokens with ``resample`` where no source run has the values
            (sources among the new tokens, taps of the conv), or in a layer whose ``h_start`` is patched.
    """
    model.require_mamba("patched runs")
    model.require_stream("generations with patches")
    ids, last = model.to_tokens(tokens)
    if last is not None and len(lengths := sorted({position + 1 for position in last.tolist()})) > 1:
        raise ValueError(f"generation needs prompts of one length, not of {lengths} tokens: generate them one by one")
    new = whole_number(max_new_tokens, "max_new_tokens", least=1)
    other = source_tokens(model, ids, source)
    plan = Plan.make(model, ids, patches, (), resampled=other is not None)
    if isinstance(new_patches, Patch | Cut) or not all(isinstance(patch, Patch | Cut) for patch in new_patches):
        raise ValueError(
            f"new_patches are a list whose entries are Patch or Cut, not this {type(new_patches).__name__}"
        )
    steps, lasting = _steps(model, ids, new, new_patches, resampled=other is not None)
    if not model.all_scans:
        return _anew(model, ids, new, patches, new_patches, other)
    plan = _also(model, plan, lasting)
    plans = [_also(model, Plan.make(model, ids[:, :1], (), ()), changes) for changes in steps]
    rows = len(ids) if any(one.calls for one in plans) else None
    parts = row_parts(model, ids, plan, rows, logits=False)
    found = []
    for part in parts:
        own, there = [one.rows(part, len(ids)) for one in plans], None if other is None else other[part]
        found.append(ask(model, continue_greedily, ids[part], there, plan.rows(part, len(ids)), own)["tokens"])
    return torch.cat(found)


def _steps(
    model: MambaModel, ids: Int[Tensor, "B L"], new: int, new_patches: Sequence[Patch | Cut], *, resampled: bool
) -> tuple[list[list[Change]], list[Change]]:
    """What changes in the run of each new token alone, and the cuts, which begin with the prompt and its sources.

    Raises:
        ValueError: for a patch that does not fit, or two cuts of the same; for a cut in a layer whose ``h_start`` is
            patched, since it is not known what of the sources is in the state that is put there.
    """
    first, stop = ids.shape[1], ids.shape[1] + new - 1
    steps: list[list[Change]] = [[] for _ in range(new - 1)]
    cuts: list[Change] = []
    starts = set()
    for patch in new_patches:
        if isinstance(patch, Cut):
            changes = check_new_cut(model, ids, patch, new, resampled=resampled)
            for change in changes:
                at = [(position, at_one(change, position, len(cuts))) for position in range(first, stop)]
                for position, one in at:
                    steps[position - first] += [] if one is None else [one]
                cuts += [] if change.sources is None else [replace(change, lasting=len(cuts))]
        else:
            ref = resolve(model, patch.site, patch.layer)
            starts |= {ref.layer} if ref.site.name == "h_start" else set()
            for position, one in _at_each(model, patch, first, stop):
                steps[position - first].append(check_patch(model, ids[:, :1], one))
    refuse_twice(cuts)
    if both := starts & {cut.layer for cut in cuts}:
        raise ValueError(f"layer {min(both)} has a cut of new tokens and a patched h_start: give one of the two")
    return steps, cuts


def _also(model: MambaModel, plan: Plan, changes: Sequence[Change]) -> Plan:
    """A plan with more changes."""
    plan = replace(plan, changes=[*plan.changes, *changes])
    if plan.whole:
        plan.refuse_touched_sites(model, logits=True)
    return plan


def _anew(
    model: MambaModel,
    ids: Int[Tensor, "B L"],
    new: int,
    patches: Sequence[Patch | Cut],
    new_patches: Sequence[Patch | Cut],
    source: Int[Tensor, "B L"] | None,
) -> Int[Tensor, "B M"]:
    """`generate` where positions leave more than a state behind: the growing text is run anew at every step."""
    first, stop = ids.shape[1], ids.shape[1] + new - 1
    begun = [_within(model, patch, first) for patch in patches]
    for end in range(first, first + new):
        now: list[Patch | Cut] = []
        for patch in new_patches:
            if isinstance(patch, Cut):
                now += cut_until(patch, len(ids), end)
            else:
                now += [_moved(one, at) for at, one in _at_each(model, patch, first, stop) if at < end]
        there = None if source is None else torch.cat([source, ids[:, first:]], dim=1)  # what follows is not looked at
        ids = torch.cat([ids, run(model, ids, [*begun, *now], source=there).argmax(-1, keepdim=True)], dim=1)
    return ids


def _within(model: MambaModel, patch: Patch | Cut, length: int) -> Patch | Cut:
    """A patch of the prompt, in a longer text."""
    if isinstance(patch, Cut):
        sources, targets = (_from_start(places, length) for places in (patch.sources, patch.targets))
        return replace(patch, sources=sources, targets=targets)
    ref = resolve(model, patch.site, patch.layer)
    if not ref.site.by_position or ref.position is not None:
        return patch
    positions = list(range(length)) if patch.positions is None else _from_start(patch.positions, length)
    return replace(patch, positions=positions)


def _from_start(positions, length: int):
    """The positions of a prompt, counted from its start; each row's own, which are, as they stand."""
    own = torch.as_tensor(positions).dim() == 2
    return positions if own else [position % length for position in integers(positions)]


def _moved(patch: Patch, position: int) -> Patch:
    """A patch of one new token, in the whole text."""
    return replace(patch, positions=[position])


def _at_each(model: MambaModel, patch: Patch, first: int, stop: int) -> list[tuple[int, Patch]]:
    """The positions at which a patch of new tokens acts, each with what it is in a run of that token alone."""
    ref = resolve(model, patch.site, patch.layer)
    if ref.position is not None and patch.positions is not None:
        raise ValueError(f"{patch.site!r} names its position; give no positions as well")
    at = patch.positions if ref.position is None else [ref.position]
    positions = list(range(first, stop)) if at is None else integers(at)
    if at is not None and not (positions and all(first <= position < stop for position in positions)):
        read = f"at positions {first} to {stop - 1}" if stop > first else "of which there are none"
        raise ValueError(f"new_patches act where new tokens are read, {read}, not at {positions}")
    if at is not None and not ref.site.by_position:
        raise ValueError(f"the site {ref.site.name!r} has no positions; patch it with positions=None")
    value, axis = patch.value, 1 - len(ref.site.shape) + (patch.slice is not None)  # of the positions
    found = []
    for column, position in enumerate(positions):
        if at is not None and isinstance(value, Tensor) and value.dim() >= -axis:
            if ref.position is not None and value.dim() == -axis:
                one = value.unsqueeze(axis)
            elif value.shape[axis] not in (1, len(positions)):
                raise ValueError(
                    f"a value of shape {tuple(value.shape)} does not fit the site {ref.site.name!r} at "
                    f"{len(positions)} positions"
                )
            else:
                one = value.narrow(axis, column if value.shape[axis] > 1 else 0, 1)
        else:
            one = value
        found.append((position, replace(patch, site=ref.site.name, layer=ref.layer, value=one, positions=None)))
    return found


def continue_greedily(
    model, ids: Int[Tensor, "B L"], source: Int[Tensor, "B L"] | None, plan: Plan, later: Sequence[Plan]
) -> dict[str, Tensor]:
    """`generate` on some rows, here or on a server: one trace reads the prompt, and one each new token."""
    if source is not None:
        keys = {key for change in plan.changes for key in change.resampled(ids.shape[1])}
        plan = replace(plan, source=source_values(model, source, keys))
    states: list[LayerState] | None = None
    found, start, carried = [ids.to(model.device)], 0, {}
    for changes in (plan, *later):
        segment = found[-1]
        last = torch.full_like(segment[:, 0], segment.shape[1] - 1)
        with torch.no_grad(), model.trace(segment):
            outcome = continued(model, changes, states, last, carried, start).save()  # pyright: ignore[reportAttributeAccessIssue]
        states, logits, carried = outcome
        found.append(logits.argmax(-1, keepdim=True))
        start += segment.shape[1]
    return {"tokens": torch.cat(found, dim=1)}


def continued(
    model,
    plan: Plan,
    states: list[LayerState] | None,
    last: Int[Tensor, "B"],
    carried: Mapping[int, Tensor | None],
    start: int,
) -> Any:
    """The body of a trace: what it leaves behind in each layer, the logits at its last position, and its cuts' part."""
    visitor = plan.visitor(Prefix, states, carried, start)
    walk(model, visitor)
    return visitor.left, unembed(model, plan, last, visitor), visitor.after
