"""What to change in a run and what to read from it: `Patch`, `cache`, `run`, each one nnsight trace.

This file is shipped to remote servers: what runs inside a trace uses torch alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import integer, integers, listed, real_number, scalar, whole_number
from ..memory import fitting_rows, forward_bytes, site_bytes
from ..trace.anatomy import output_logits
from ..trace.blocks import BLOCK_SITES, EVERY_SITE
from ..trace.conv import ConvStages
from ..trace.location import StageSite, open_stages, take_over
from ..trace.s6 import ScanStages
from ..trace.sites import SITES, SiteInfo, owner
from ..trace.stages import cast
from ..trace.touched import hooks, refuse_hooked_output

if TYPE_CHECKING:
    from ..models.model import MambaModel

Tokens = Tensor | str | Sequence[str]
_ALIAS = re.compile(r"(?:blocks\.(\d+)\.)?hook_([A-Za-z_]+?(?:_\d)?)(?:\.(\d+))?$")
OPERATIONS = {stages.ORDER[0]: stages for stages in (ConvStages, ScanStages)}
"""The mixer's operations by their first site: where our own take over."""
_STAGES = {**dict.fromkeys(ConvStages.ORDER, ConvStages), **dict.fromkeys(ScanStages.ORDER, ScanStages)}


@dataclass(frozen=True)
class SiteRef:
    """One site of one layer, at one position if an alias such as ``blocks.39.hook_h.7`` names it.

    Attributes:
        site: the site's row of the table.
        layer: its layer, or None for the sites outside the layers.
        position: the position an alias names, else None.
    """

    site: SiteInfo
    layer: int | None
    position: int | None = None

    @property
    def key(self) -> str:
        """The MambaLens name: ``blocks.39.hook_h``, ``hook_embed``."""
        name = f"hook_{self.site.name}" + ("" if self.position is None else f".{self.position}")
        return name if self.layer is None else f"blocks.{self.layer}.{name}"


@dataclass(frozen=True, eq=False)
class Patch:
    """One change of a run: at ``site`` of ``layer``, at ``positions``, ``value`` takes the model's place.

    Attributes:
        site: a site's name or a full alias (``blocks.39.hook_h.7``, which also says layer and position).
        layer: the layer, counted from 0; None for ``embed``, ``norm`` and ``logits``.
        value: a number, or a tensor or numpy array broadcastable to the site at those positions:
        ``[B, len(positions), ...]`` (``[E, N]`` for ``A``; with ``slice``, ``[B, len(positions), E]``; under an
        alias with a position the position's dimension may be left out). Or a callable that is given a copy of what
        is there, of that shape, and returns what takes its place; at ``h`` it is called position by position,
        ``[B, 1, E, N]``, with the state as it has become.
        positions: the positions to change, counted from 0 (negative: from the end); None for all of them. Or each
            row's own, a LongTensor ``[B, k]`` counted from 0, -1 for none: values are then ``[B, k, ...]``, and a
            callable sees that (of a row that has none, what it sees is no matter, and what it returns is not used).
            Patched states (``h``) hold at their positions and the states after them follow.
        slice: for ``conv_slice``, the one tap to change: -3, -2, -1 or 0. The term at *output* position p that comes
            from ``in_proj`` at p + slice is replaced.
    """

    site: str
    layer: int | None
    value: Tensor | float | Callable[[Tensor], Tensor | float]
    positions: int | Sequence[int] | Int[Tensor, "B k"] | None = None
    slice: int | None = None


def resolve(model: MambaModel, site: str | tuple[str, int], layer: int | None = None) -> SiteRef:
    """The site that a name, an alias or a pair (name, layer) refers to.

    Raises:
        ValueError: for an unknown site, a layer the model does not have, or a layer where none belongs.
    """
    if isinstance(site, tuple) and len(site) == 2:
        site, layer = site
    if not isinstance(site, str):
        raise ValueError(f"a site is a name, or a pair (name, layer), not {site!r}")
    if layer is not None:
        if (whole := integer(layer)) is None:
            raise ValueError(f"a layer is an integer, not {layer!r}")
        layer = whole
    position = None
    if match := _ALIAS.fullmatch(site):
        number, name, at = match.groups()
        if number is not None and layer is not None and int(number) != layer:
            raise ValueError(f"{site!r} names layer {number}, but layer {layer} was asked for")
        layer = int(number) if number is not None else layer
        position = None if at is None else int(at)
    else:
        name = site
    known = SITES if model.has_scans else EVERY_SITE
    if name not in known:
        near = difflib.get_close_matches(name.rpartition("hook_")[2].partition(".")[0], known, 1)
        meant = f"is {near[0]!r} meant? The" if near else "the"
        raise ValueError(f"unknown site {site!r}; {meant} sites are {', '.join(known)}")
    info = known[name]
    if info.owner == "model":
        if layer is not None:
            raise ValueError(f"the site {name!r} is outside the layers; give no layer, not {layer}")
    elif layer is None or not 0 <= layer < model.n_layers:
        raise ValueError(f"the site {name!r} needs a layer from 0 to {model.n_layers - 1}, not {layer}")
    if not model.has_scans:
        model.require_site(name, layer)
    if position is not None and not info.by_position:
        raise ValueError(f"the site {name!r} has no positions, but {site!r} names position {position}")
    return SiteRef(info, layer, position)


class ActivationCache(dict):
    """Activations by MambaLens name (``blocks.39.hook_h``); ``cache["h", 39]`` and ``cache["embed"]`` find them too."""

    def __missing__(self, key):
        name, layer = key if isinstance(key, tuple) else (key, None)
        full = f"hook_{name}" if layer is None else f"blocks.{layer}.hook_{name}"
        if full not in self:
            raise KeyError(key)
        return self[full]


def cache(
    model: MambaModel,
    tokens: Tokens,
    sites: Iterable[str | tuple[str, int]],
    *,
    patches: Sequence[Patch] = (),
    positions: int | Sequence[int] | Int[Tensor, "B k"] | None = None,
    batch_rows: int | None = None,
) -> ActivationCache:
    """The named activations of one run, which stops after the last of them.

    Args:
        model: a model from `load_model`; of one without scans `sites_of` names the sites that there are.
        tokens: token ids ``[B, L]``, a text, or texts (padded on the right).
        sites: names and aliases: ``"blocks.39.hook_h"``, ``("conv", 3)``, ``"embed"``; a layer's site without a
            layer means every layer.
        patches: changes made in the same run.
        positions: which positions to keep, of sites that have them: one, a list (negative: from the end), or each
            row's own, ``[B, k]``. None for all of them.
        batch_rows: how many rows run at once; None for as many as ``model.memory`` allows. No result depends on it.

    Returns:
        A dict keyed ``blocks.{layer}.hook_{site}``, each value ``[B, L, ...]`` as the table of sites says
        (``[E, N]`` for ``A``; ``[B, k, ...]`` for k positions; without L under an alias that names a position).

    Raises:
        ValueError: for an unknown site, layer or position, a position where one of the texts has ended, or a patch that
            fits none.
    """
    if isinstance(sites, str):
        sites = [sites]
    if not isinstance(sites, Iterable):
        raise ValueError(f"sites are names or (name, layer) pairs, not {sites!r}")
    refs: list[SiteRef] = []
    for site in sites:
        bare = site in EVERY_SITE and EVERY_SITE[site].owner != "model" if isinstance(site, str) else False
        refs += [resolve(model, site, i) for i in range(model.n_layers)] if bare else [resolve(model, site)]
    if not refs:
        raise ValueError("no site was named")
    ids, last = model.to_tokens(tokens)
    named = [ref.position for ref in refs if ref.position is not None]
    if positions is not None and named:
        raise ValueError(f"positions={positions!r} and an alias that names position {named[0]}: give one of the two")
    for position in named:
        if position >= ids.shape[1]:
            raise ValueError(f"position {position} is outside the prompt's {ids.shape[1]} positions")
    keep = None if positions is None else kept_positions(ids, positions)
    refuse_ends(last, [positions])
    refuse_padding(last, named if keep is None else keep)
    plan = Plan.make(model, ids, patches, refs, keep)
    refuse_ends(last, [patch.positions for patch in patches])
    shared = {ref.key for ref in refs if "B" not in ref.site.shape}
    found: dict[str, Tensor] = {}
    for part in row_parts(model, ids, plan, batch_rows, logits=plan.last == model.n_layers):
        for key, value in read_sites(model, ids[part], plan.rows(part, len(ids))).items():
            found[key] = value if key in shared else _joined(found.get(key), value, part, len(ids))
    return ActivationCache((ref.key, found[ref.key]) for ref in refs)


def run(
    model: MambaModel,
    tokens: Tokens,
    patches: Sequence[Patch] = (),
    *,
    positions: Int[Tensor, "B"] | Literal["all"] | None = None,
) -> Float[Tensor, "B V"] | Float[Tensor, "B L V"]:
    """The logits of one patched run; as many rows run at once as ``model.memory`` allows, and no result depends on it.

    Args:
        model: a model from `load_model`.
        tokens: token ids ``[B, L]``, a text, or texts (padded on the right).
        patches: what to change, in any order; at one site they apply in the order given.
        positions: where to read: None for the last column (of texts: each text's own last token), a LongTensor
            ``[B]`` for one position a row, ``"all"`` for logits ``[B, L, V]``.

    Raises:
        ValueError: for a patch at an unknown site, layer or position, or with a value that does not fit; for a position
            where one of the texts has ended.
    """
    ids, last = model.to_tokens(tokens)
    read = read_positions(ids, last if positions is None else positions)
    refuse_ends(last, [None if read is None else positions])
    refuse_padding(last, [] if read is None else read[:, None])
    plan = Plan.make(model, ids, patches, ())
    refuse_ends(last, [patch.positions for patch in patches])
    logits = None
    for part in row_parts(model, ids, plan, None, logits=read is None):
        value = read_logits(model, ids[part], plan.rows(part, len(ids)), None if read is None else read[part])
        logits = _joined(logits, value, part, len(ids))
    assert logits is not None  # there is at least one row
    return logits


def row_parts(model: MambaModel, ids: Int[Tensor, "B L"], plan: Plan, rows: int | None, *, logits: bool) -> list[slice]:
    """The rows to run at once: so many, or as many as the model's memory allows; all if a callable is to see them.

    Args:
        model: a Mamba.
        ids: the prompts.
        plan: what is changed and read.
        rows: how many, if that is given.
        logits: whether the logits of every position are computed.
    """
    batch, length = ids.shape
    if rows is None and plan.calls:
        rows = batch
    elif rows is None:
        refs = [ref for refs in plan.reads.values() for ref in refs]
        touched = {EVERY_SITE[name] for changes in plan.changes.values() for name in changes} | {
            ref.site for ref in refs
        }
        row = forward_bytes(model, length) + 3 * max((site_bytes(model, site, length) for site in touched), default=0)
        columns = length if plan.keep is None else plan.keep.shape[1]
        row += sum(site_bytes(model, ref.site, columns if ref.position is None else 1) for ref in refs)
        row += 2 * site_bytes(model, SITES["logits"], length) if logits else 0
        rows = fitting_rows(model, row, batch)
    else:
        rows = whole_number(rows, "batch_rows", least=1)
    return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def _joined(whole: Tensor | None, value: Tensor, part: slice, batch: int) -> Tensor:
    """The values of all rows, once those of some are put among them."""
    if len(value) == batch:
        return value
    whole = value.new_empty(batch, *value.shape[1:]) if whole is None else whole
    whole[part] = value
    return whole


def kept_positions(ids: Int[Tensor, "B L"], positions) -> Int[Tensor, "B k"]:
    """The positions to keep of each row, counted from 0.

    Raises:
        ValueError: for what is neither a position, nor a list of them, nor ``[B, k]`` of each row's own.
    """
    batch, length = ids.shape
    wanted = "positions are an integer, a list of integers, or each row's own as a tensor [B, k]"
    if getattr(positions, "ndim", 0) == 1 and not isinstance(positions, list | tuple):
        raise ValueError(
            f"{wanted}, not a tensor of shape {tuple(positions.shape)}: write positions[:, None] or a list"
        )
    try:
        found = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{wanted}, not {positions!r}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.numel() == 0:
        raise ValueError(f"{wanted}, not {positions!r}")
    if found.dim() < 2:
        found = found.reshape(1, -1).expand(batch, -1)
    if found.dim() != 2 or len(found) != batch:
        raise ValueError(f"{wanted}, here [{batch}, k], not of shape {tuple(found.shape)}")
    outside = (found < (0 if getattr(positions, "ndim", 0) == 2 else -length)) | (found >= length)  # -1 of a row: none
    if outside.any():
        raise ValueError(f"position {int(found[outside][0])} is outside the prompt's {length} positions")
    return (found % length).to(ids.device)


def refuse_padding(last: Int[Tensor, "B"] | None, positions: Int[Tensor, "B k"] | Sequence[int]) -> None:
    """Refuse to read where one of the texts has ended.

    Args:
        last: each text's last position; None where token ids were given.
        positions: those to read, each row's own or common ones.
    """
    if last is None or len(positions) == 0:
        return
    read = torch.as_tensor(positions).cpu()
    beyond = (read if read.dim() == 2 else read[None]) > last[:, None]
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        position = int(read[row, column] if read.dim() == 2 else read[column])
        raise ValueError(f"position {position} is outside text {row}, which has {int(last[row]) + 1} tokens")


def refuse_ends(last: Int[Tensor, "B"] | None, positions: Iterable) -> None:
    """Refuse positions counted from the end of texts that end at different positions.

    Args:
        last: each text's last position; None where token ids were given.
        positions: for each reader and each patch its positions, checked before; None for all.
    """
    if last is None or len(set(last.tolist())) < 2:
        return
    for given in positions:
        common = [] if given is None or getattr(given, "ndim", 0) == 2 else listed(given)
        if negative := [p for p in map(integer, common) if p is not None and p < 0]:
            raise ValueError(
                f"position {negative[0]} counts from the end, and the texts end at different positions: count from 0"
            )


def read_positions(ids: Int[Tensor, "B L"], positions) -> Int[Tensor, "B"] | None:
    """The position to read in each row, or None for all of them."""
    if isinstance(positions, str):
        if positions != "all":
            raise ValueError(f'positions are None, a LongTensor [B] or "all", not {positions!r}')
        return None
    if positions is None:
        return ids.new_full((ids.shape[0],), ids.shape[1] - 1)
    try:
        positions = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f'positions are None, a LongTensor [B] or "all", not {positions!r}') from None
    if positions.shape != ids.shape[:1] or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions hold one integer a row, [{ids.shape[0]}], not {tuple(positions.shape)}")
    if ((positions < -ids.shape[1]) | (positions >= ids.shape[1])).any():
        raise ValueError(f"positions {positions.tolist()} reach outside the prompt's {ids.shape[1]} positions")
    return (positions % ids.shape[1]).to(ids.device)


# ---------------------------------------------------------------------------------------------------------------------
# Inside the trace
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A checked `Patch`: ``value`` goes to ``positions`` of the site, in one tap if ``tap`` is given.

    ``positions`` are those of all rows, or each row's own, ``[B, k]`` with -1 for none; None for all of them.
    """

    site: SiteInfo
    value: Tensor | float | Callable[[Tensor], Tensor | float]
    positions: list[int] | Tensor | None
    tap: int | None

    def rows(self, part: slice, batch: int) -> Change:
        """The same change for some of the rows."""
        dims = len(self.site.shape) - (self.tap is not None)
        value, positions = self.value, self.positions
        if isinstance(value, Tensor) and value.dim() == dims and self.site.shape[0] == "B" and len(value) == batch:
            value = value[part]
        if isinstance(positions, Tensor):
            positions = positions[part]
        return replace(self, value=value, positions=positions)


@dataclass(frozen=True)
class Plan:
    """What one trace changes and reads, by layer (None: outside the layers) and site.

    Attributes:
        changes: layer -> site name -> the changes there, in order.
        reads: layer -> the sites to read there.
        last: the last layer that has to run; the model's output is needed where it equals the number of layers.
        keep: the positions of each row to keep of what is read, ``[B, k]``; None for all of them.
        whole: whether the prompts run as they are to the end, since the model carries edits or hooks.
    """

    changes: dict[int | None, dict[str, list[Change]]]
    reads: dict[int | None, list[SiteRef]]
    last: int
    keep: Tensor | None = None
    whole: bool = False

    @property
    def calls(self) -> bool:
        """Whether a value is a callable, which is to see every row."""
        return any(
            callable(change.value) for sites in self.changes.values() for some in sites.values() for change in some
        )

    def rows(self, part: slice, batch: int) -> Plan:
        """The same for some of the rows."""
        changes = {
            layer: {name: [change.rows(part, batch) for change in some] for name, some in sites.items()}
            for layer, sites in self.changes.items()
        }
        keep = None if self.keep is None else self.keep[part]
        return replace(self, changes=changes, keep=keep)

    @classmethod
    def make(
        cls,
        model: MambaModel,
        ids: Tensor,
        patches: Sequence[Patch],
        refs: Sequence[SiteRef],
        keep: Tensor | None = None,
    ) -> Plan:
        """Check the patches against the model and the prompt, and sort everything by layer."""
        changes: dict = {}
        if isinstance(patches, Patch) or not all(isinstance(patch, Patch) for patch in patches):
            raise ValueError(f"patches are a list whose entries are Patch, not this {type(patches).__name__}")
        for patch in patches:
            ref, change = check_patch(model, ids, patch)
            changes.setdefault(ref.layer, {}).setdefault(ref.site.name, []).append(change)
        reads: dict = {}
        for ref in refs:
            reads.setdefault(ref.layer, []).append(ref)
        outside = any(ref.site.name in ("norm", "logits") for ref in refs)
        whole = bool(model._edits) or any(hooks(model))
        last = (
            model.n_layers
            if outside or whole or not refs or not model.has_scans
            else max(ref.layer or 0 for ref in refs)
        )
        plan = cls(changes, reads, last, keep, whole)
        if whole:
            plan.refuse_touched_sites(model, logits=not refs)
        return plan

    def refuse_touched_sites(self, model: MambaModel, logits: bool) -> None:
        """Refuse to read or change what the model's edits or hooks change without this trace seeing it."""
        used = {(layer, name) for layer, sites in self.changes.items() for name in sites}
        used |= {(ref.layer, ref.site.name) for refs in self.reads.values() for ref in refs}
        used |= {(None, "logits")} if logits else set()
        paths: dict[str, str] = {}
        for layer, name in used:
            envoy = owner(model, EVERY_SITE[name], layer)
            if name not in _STAGES:
                location = getattr(type(envoy), EVERY_SITE[name].attribute)._location(envoy)
                paths[location.removeprefix(f"{model.path}").removeprefix(".").removesuffix(".output")] = name
            if name == "out_proj":
                paths[envoy.mixer.path.removeprefix(f"{model.path}.")] = name
            if name == "logits":
                paths[""] = name
        refuse_hooked_output(model, paths)


def check_patch(model: MambaModel, ids: Tensor, patch: Patch) -> tuple[SiteRef, Change]:
    """The patch's site and the change it makes, or a sentence that says what would be right."""
    ref = resolve(model, patch.site, patch.layer)
    site, batch, length = ref.site, *ids.shape
    positions = patch.positions
    if ref.position is not None:
        if positions is not None:
            raise ValueError(f"{patch.site!r} names its position; give no positions as well")
        positions = [ref.position]
    if positions is not None:
        if not site.by_position:
            raise ValueError(f"the site {site.name!r} has no positions; patch it with positions=None")
        own = own_positions(ids, positions)
        positions = own if own is not None else integers(positions)
    if isinstance(positions, list):
        if not positions or not all(-length <= p < length for p in positions):
            raise ValueError(f"positions {positions} of a prompt with {length} positions: use 0 to {length - 1}")
        positions = [p % length for p in positions]
        if len(set(positions)) < len(positions):
            raise ValueError(f"positions {positions} name one position twice")
    tap = None
    if patch.slice is not None:
        taps = range(1 - model.d_conv, 1) if model.has_scans else ()
        tap = integer(patch.slice)
        if tap is None or site.name != "conv_slice" or tap not in taps:
            raise ValueError(
                f"slice={patch.slice} at the site {site.name!r}: slices are {list(taps)}, at the site 'conv_slice'"
            )
        tap -= 1
    count = length if positions is None else positions.shape[1] if isinstance(positions, Tensor) else len(positions)
    letters = {"B": batch, "L": count, **model.sizes()}
    shape = [letters[letter] for letter in site.shape[: -1 if tap is not None else None]]
    value = _patch_value(patch.value)
    if isinstance(value, Tensor):
        if ref.position is not None and value.dim() == len(shape) - 1:
            value = value.unsqueeze(1)
        try:
            fits = list(torch.broadcast_shapes(value.shape, shape)) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"a value of shape {tuple(value.shape)} does not fit the site {site.name!r} there, {tuple(shape)}"
            )
    return ref, Change(site, value, positions, tap)


def own_positions(ids: Int[Tensor, "B L"], positions) -> Int[Tensor, "B k"] | None:
    """Each row's own positions, on the CPU, if the positions given are such; None if they are not.

    Raises:
        ValueError: for other rows than the prompts', a position outside the prompts, or one that a row names twice.
    """
    nested = isinstance(positions, list | tuple) and any(isinstance(one, list | tuple) for one in positions)
    if not nested and getattr(positions, "ndim", 0) < 2:
        return None
    wanted = f"each row's own positions are whole numbers of shape [{len(ids)}, k]"
    try:
        found = torch.as_tensor(positions).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{wanted}, not {positions!r:.80}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{wanted}, not {found.dtype}")
    if found.dim() != 2 or len(found) != len(ids) or not found.shape[1]:
        raise ValueError(f"{wanted}, not of shape {tuple(found.shape)}")
    found = found.long()
    outside = (found < -1) | (found >= ids.shape[1])
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of a patch's positions: {int(found[row, column])} is no position of a prompt with "
            f"{ids.shape[1]} positions: use 0 to {ids.shape[1] - 1}, or -1 for none"
        )
    ordered = found.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(f"row {row} of a patch's positions names position {int(ordered[row, column])} twice")
    return found


def _patch_value(given) -> Tensor | float | Callable:
    """What a patch puts in: a tensor or callable as it is, an array as a tensor, a number as Python's own."""
    value = given
    if callable(value):
        return value
    if not isinstance(value, Tensor):
        value = scalar(value)
        if hasattr(value, "__array__"):
            array = value.__array__()
            try:
                value = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
            except TypeError:
                raise ValueError(
                    f"a patch's value is a real tensor, a number or a callable, not {array.dtype}"
                ) from None
    if isinstance(value, Tensor):
        if not value.is_complex() and value.dtype != torch.bool:
            return value
    elif (number := real_number(value)) is not None:
        return float(number)
    kind = value.dtype if isinstance(value, Tensor) else type(given).__name__
    raise ValueError(f"a patch's value is a real tensor, a number or a callable, not {kind}")


def read_sites(model, ids: Int[Tensor, "B L"], plan: Plan) -> dict[str, Tensor]:
    """What a plan reads, by key, in one trace."""
    found: dict[str, Tensor] = {}
    with torch.no_grad(), model.trace(ids):
        found = forward(model, plan, None)[0].save()
    return found


def read_logits(model, ids: Int[Tensor, "B L"], plan: Plan, read: Int[Tensor, "B"] | None) -> Tensor:
    """The logits under a plan, in one trace: at ``read``, ``[B, V]``, or where it is None everywhere, ``[B, L, V]``."""
    with torch.no_grad(), model.trace(ids):
        logits = forward(model, plan, read)[1].save()
    return logits


def forward(model, plan: Plan, read: Tensor | None) -> Any:
    """The body of a trace: apply the plan's changes and gather its reads, layer after layer.

    Returns:
        The activations read, by key, and the logits at ``read`` (``[B, V]``, or ``[B, L, V]`` where it is None);
        the logits are None if the plan ends inside the model.
    """
    found: dict[str, Tensor] = {}
    visit(model, None, ("embed",), plan, found)
    names = [name for name, site in SITES.items() if site.owner != "model"] if model.has_scans else BLOCK_SITES
    for layer in range(min(plan.last + 1, model.n_layers)):
        visit(model, layer, names, plan, found)
    if plan.last < model.n_layers:
        leave_out(model, plan.last + 1)
        return found, None
    return found, unembed(model, plan, read, found)


def unembed(model, plan: Plan, read: Tensor | None, found: dict[str, Tensor]) -> Tensor:
    """The end of a trace's body: the sites after the layers, and the logits at ``read``."""
    visit(model, None, ("norm",), plan, found)
    outputs = plan.changes.get(None, {}).get("logits") or any(
        ref.site.name == "logits" for ref in plan.reads.get(None, ())
    )
    if read is not None and not outputs and not plan.whole and model.has_scans:
        return logits_at(model, read)
    visit(model, None, ("logits",), plan, found)
    result = output_logits(model)
    return result if read is None else result[torch.arange(read.shape[0], device=read.device), read]


def logits_at(model, read: Tensor) -> Tensor:
    """The logits of a Mamba's output at one position a row, which alone are unembedded."""
    rows = torch.arange(read.shape[0], device=read.device)
    norm = model.final_norm
    norm.output = norm.output[rows, read].unsqueeze(1)
    return output_logits(model)[:, 0]


def leave_out(model, first: int) -> None:
    """Run no layer from ``first`` on, and no unembedding.

    Unlike `tracer.stop`, after which NDIF's sandbox (0.1.2) gives the next trace of the request nothing.
    """
    for layer in range(first, model.n_layers):
        model.layers[layer].skip(model.layers[layer].input)
    model.unembedding.skip(model.unembedding.input)


def visit(model, layer: int | None, names: Iterable[str], plan: Plan, found: dict[str, Tensor]) -> None:
    """Apply the changes and gather the reads at one layer's sites, in execution order."""
    changes, reads = plan.changes.get(layer, {}), plan.reads.get(layer, ())
    wanted = {ref.site.name for ref in reads}
    moved = None
    for name in names:
        if name == "resid_post" and moved is not None:
            model.layers[layer].resid_post += moved
        if name in OPERATIONS:
            take_over(model.layers[layer].mixer, OPERATIONS[name])
        if name not in changes and name not in wanted:
            continue
        site = EVERY_SITE[name]
        envoy = owner(model, site, layer)
        before = envoy.mlp_in.clone() if name == "resid_mid" and name in changes else None
        if name in changes:
            change_site(envoy, site, changes[name])
        if before is not None:
            moved = envoy.mlp_in - before
        for ref in reads:
            if ref.site is site:
                value = look_at(envoy, site).detach()
                if ref.position is not None:
                    value = value[:, ref.position].clone()
                elif plan.keep is not None and site.by_position:
                    keep = plan.keep.to(value.device)
                    value = value[torch.arange(len(keep), device=keep.device)[:, None], keep]
                found[ref.key] = value


def look_at(envoy, site: SiteInfo) -> Tensor:
    """The site's value, for a reader who does not change it."""
    descriptor = getattr(type(envoy), site.attribute)
    if isinstance(descriptor, StageSite):
        return open_stages(envoy, descriptor.stages).peek(descriptor.name)
    return getattr(envoy, site.attribute)


def change_site(envoy, site: SiteInfo, changes: Sequence[Change]) -> None:
    """Apply the changes to one site. States are held at the changed positions; the later ones follow."""
    if site.name == "h":
        stages = open_stages(envoy, ScanStages)
        length = stages.x.shape[1]
        for change in changes:
            if isinstance(change.positions, Tensor):
                stages.hold(
                    own_states(change, change.positions), sorted(set(change.positions.flatten().tolist()) - {-1})
                )
                continue
            positions = list(range(length)) if change.positions is None else change.positions
            stages.hold(state_patch(change, positions), positions)
        return
    value = getattr(envoy, site.attribute)
    for change in changes:
        target = value if change.tap is None else value[..., change.tap]
        if isinstance(change.positions, Tensor):
            positions = change.positions.to(target.device)
            rows = torch.arange(len(positions), device=target.device)[:, None]
            new = new_value(change, target[rows, positions.clamp(min=0)])
            row, column = (positions >= 0).nonzero(as_tuple=True)
            target[row, positions[row, column]] = new[row, column]
        elif change.positions is None:
            target[...] = new_value(change, target)
        else:
            target[:, change.positions] = new_value(change, target[:, change.positions])


def new_value(change: Change, there: Tensor) -> Tensor:
    """What takes the place of what is there."""
    value = change.value(there.clone()) if callable(change.value) else change.value
    if callable(change.value) and not isinstance(value, Tensor | int | float):
        kind = type(value).__name__
        raise ValueError(f"the callable at {change.site.name!r} must return a tensor or a float, not {kind}")
    return cast(value, there)


def own_states(change: Change, positions: Int[Tensor, "B k"]):
    """The callable that holds each row's states at the row's own positions."""
    value, k = change.value, positions.shape[1]

    def patch(t: int, h: Tensor) -> Tensor:
        row, column = (positions == t).nonzero(as_tuple=True)
        if not len(row):
            return h
        row, column = row.to(h.device), column.to(h.device)
        if callable(value):
            new = new_value(change, h[:, None])[row, 0]
        else:
            shape = (len(h), k, *h.shape[1:])
            new = cast(value, h.new_empty(()).expand(shape))[row, column]
        held = h.clone()
        held[row] = new
        return held

    return patch


def state_patch(change: Change, positions: list[int]):
    """The callable that holds the states at ``positions`` to the value, broadcastable to [B, len(positions), E, N]."""
    value = change.value
    if callable(value):
        held = set(positions)
        return lambda t, h: new_value(change, h[:, None])[:, 0] if t in held else h
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    per_position = value.dim() >= 3 and value.shape[-3] > 1
    where = {position: index for index, position in enumerate(positions)}

    def patch(t: int, h: Tensor) -> Tensor:
        if t not in where:
            return h
        state = value
        if value.dim() >= 3:
            state = value.select(-3, where[t] if per_position else 0)
        return cast(state, h)

    return patch
