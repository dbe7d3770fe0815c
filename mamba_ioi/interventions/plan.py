"""What one trace changes and reads, sorted by layer and site, and the trace itself.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..trace.anatomy import output_logits
from ..trace.change import Change, Patched, Placed, SourceValues
from ..trace.location import StageSite
from ..trace.sites import SITES, owner
from ..trace.state import LayerState
from ..trace.touched import hooks, refuse_hooked_output
from ..trace.walk import leave_out, logits_at, walk
from .cut import Cut, check_cut, refuse_twice
from .patch import Patch, SiteRef, check_patch, resolve

if TYPE_CHECKING:
    from ..models.model import MambaModel


@dataclass(frozen=True)
class Plan:
    """What one trace changes and reads.

    Attributes:
        changes: the changes, in the order in which they are made.
        reads: the sites to read.
        last: the last layer that has to run; the model's output is needed where it equals the number of layers.
        keep: the positions of each row to keep of what is read, ``[B, k]``; None for all of them.
        whole: whether the prompts run as they are to the end, since the model carries edits or hooks.
        source: the source run's values of these rows that changes take.
    """

    changes: list[Change]
    reads: list[SiteRef]
    last: int
    keep: Tensor | None = None
    whole: bool = False
    source: SourceValues = field(default_factory=dict)

    @property
    def calls(self) -> bool:
        """Whether a value is a callable, which is to see every row."""
        return any(callable(change.value) for change in self.changes)

    def rows(self, part: slice, batch: int) -> Plan:
        """The same for some of the rows."""
        keep = None if self.keep is None else self.keep[part]
        return replace(self, changes=[change.rows(part, batch) for change in self.changes], keep=keep)

    def visitor(
        self,
        kind: type[Patched] = Patched,
        states: Sequence[LayerState] | None = None,
        carried: Mapping[int, Tensor | None] = {},
        offset: int = 0,
    ) -> Any:
        """What makes the changes and keeps what is read on the walk, from what earlier positions left behind.

        Args:
            kind: of visitor.
            states: what earlier positions left behind.
            carried: of cuts that last, by number, what earlier sources give to the state that the run begins with.
            offset: what the positions of these are ahead of the run's.
        """
        after: dict[int, Tensor | None] = {}
        placed = [
            Placed(change)
            if change.lasting is None
            else Placed(change, carried=carried.get(change.lasting), offset=offset, after=after)
            for change in self.changes
        ]
        reads: dict[int | None, dict[str, list]] = {}
        for ref in self.reads:
            reads.setdefault(ref.layer, {}).setdefault(ref.site.name, []).append((ref.key, ref.position))
        return kind(by_layer(placed), reads, self.keep, states, source=self.source, after=after)

    @classmethod
    def make(
        cls,
        model: MambaModel,
        ids: Tensor,
        patches: Sequence[Patch | Cut],
        refs: Sequence[SiteRef],
        keep: Tensor | None = None,
        *,
        resampled: bool = False,
    ) -> Plan:
        """Check the patches against the model and the prompt; ``resampled``: there are source prompts for cuts."""
        if isinstance(patches, Patch | Cut) or not all(isinstance(patch, Patch | Cut) for patch in patches):
            raise ValueError(f"patches are a list whose entries are Patch, not this {type(patches).__name__}")
        changes: list[Change] = []
        for patch in patches:
            if isinstance(patch, Cut):
                changes += check_cut(model, ids, patch, resampled=resampled)
            else:
                changes.append(check_patch(model, ids, patch))
        refuse_twice(changes)
        outside = any(ref.site.name in ("norm", "logits") for ref in refs)
        whole = bool(model._edits) or any(hooks(model))
        to_the_end = outside or whole or not refs or not model.all_scans
        last = model.n_layers if to_the_end else max(ref.layer or 0 for ref in refs)
        plan = cls(changes, list(refs), last, keep, whole)
        if whole:
            plan.refuse_touched_sites(model, logits=not refs)
        return plan

    def refuse_touched_sites(self, model: MambaModel, logits: bool) -> None:
        """Refuse to read or change what the model's edits or hooks change without this trace seeing it."""
        used = {(one.layer, one.site) for one in (*self.changes, *self.reads)}
        used |= {(None, SITES["logits"])} if logits else set()
        paths: dict[str, str] = {}
        for layer, site in used:
            envoy = owner(model, site, layer)
            descriptor = getattr(type(envoy), site.attribute)
            if not isinstance(descriptor, StageSite):
                location = descriptor._location(envoy)
                paths[location.removeprefix(f"{model.path}").removeprefix(".").removesuffix(".output")] = site.name
            if site.name == "out_proj":
                paths[envoy.mixer.path.removeprefix(f"{model.path}.")] = site.name
            if site.name == "logits":
                paths[""] = site.name
        refuse_hooked_output(model, paths)


def by_layer(changes: Iterable[Placed]) -> dict[int | None, dict[str, list[Placed]]]:
    """Changes by layer and site, each list in the order given."""
    found: dict[int | None, dict[str, list[Placed]]] = {}
    for one in changes:
        found.setdefault(one.change.layer, {}).setdefault(one.change.site.name, []).append(one)
    return found


def read_sites(model, ids: Int[Tensor, "B L"], plan: Plan) -> dict[str, Tensor]:
    """What a plan reads, by key, in one trace."""
    found: dict[str, Tensor] = {}
    with torch.no_grad(), model.trace(ids):
        found = forward(model, plan, None)[0].save()
    return found


def source_values(model, source: Int[Tensor, "B L"], keys: Iterable[tuple[int, str, int]]) -> SourceValues:
    """The source run's values by (layer, site, position)."""
    aliases = {key: f"blocks.{key[0]}.hook_{key[1]}.{key[2]}" for key in sorted(keys)}
    if not aliases:
        return {}
    plan = Plan.make(model, source, (), [resolve(model, alias) for alias in aliases.values()])
    found = read_sites(model, source, plan)
    return {key: found[alias] for key, alias in aliases.items()}


def read_logits(model, ids: Int[Tensor, "B L"], plan: Plan, read: Int[Tensor, "B"] | None) -> Tensor:
    """The logits under a plan, in one trace: at ``read``, ``[B, V]``, or where it is None everywhere, ``[B, L, V]``."""
    with torch.no_grad(), model.trace(ids):
        logits = forward(model, plan, read)[1].save()
    return logits


def forward(model, plan: Plan, read: Int[Tensor, "B"] | None) -> Any:
    """The body of a trace: make the plan's changes and gather what it reads.

    Returns:
        The activations read, by key, and the logits at ``read`` (``[B, V]``, or ``[B, L, V]`` where it is None);
        the logits are None if the plan ends inside the model.
    """
    visitor = plan.visitor()
    walk(model, visitor, stop=min(plan.last + 1, model.n_layers))
    if plan.last < model.n_layers:
        leave_out(model, plan.last + 1)
        return visitor.found, None
    return visitor.found, unembed(model, plan, read, visitor)


def unembed(model, plan: Plan, read: Int[Tensor, "B"] | None, visitor: Patched) -> Tensor:
    """The end of a trace's body: the sites after the layers, and the logits at ``read``."""
    visitor.at(model, None, SITES["norm"])
    outputs = any(one.site.name == "logits" for one in (*plan.changes, *plan.reads))
    if read is not None and not outputs and not plan.whole and model.all_scans:
        return logits_at(model, read)
    visitor.at(model, None, SITES["logits"])
    result = output_logits(model)
    return result if read is None else result[torch.arange(read.shape[0], device=read.device), read]
