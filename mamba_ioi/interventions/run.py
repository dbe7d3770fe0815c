"""One run: `cache` reads its activations, `run` its logits, each in as many nnsight traces as memory asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float, Int
from torch import Tensor

from ..checks import whole_number
from ..memory import fitting_rows, forward_bytes, site_bytes
from ..trace.sites import SITES
from .cut import Cut
from .patch import Patch, SiteRef, resolve
from .plan import Plan, read_logits, read_sites, source_values
from .positions import kept_positions, read_positions, refuse_ends, refuse_padding

if TYPE_CHECKING:
    from ..models.model import MambaModel

Tokens = Tensor | str | Sequence[str]


class ActivationCache(dict):
    """Activations by MambaLens name (``blocks.39.hook_h``); ``cache["h", 39]`` and ``cache["embed"]`` find them too."""

    def __missing__(self, key):
        full = full_name(key)
        if full not in self:
            raise KeyError(key)
        return self[full]


def full_name(key: str | tuple[str, int | None]) -> str:
    """The MambaLens name of a site, or of a pair (site, layer)."""
    name, layer = key if isinstance(key, tuple) else (key, None)
    return f"hook_{name}" if layer is None else f"blocks.{layer}.hook_{name}"


def cache(
    model: MambaModel,
    tokens: Tokens,
    sites: Iterable[str | tuple[str, int]],
    *,
    patches: Sequence[Patch | Cut] = (),
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
    reading = Reading.make(model, tokens, sites, patches=patches, positions=positions)
    shared = {ref.key for ref in reading.plan.reads if "B" not in ref.site.shape}
    found: dict[str, Tensor] = {}
    for part in reading.parts(batch_rows):
        for key, value in reading.read(part).items():
            found[key] = value if key in shared else _joined(found.get(key), value, part, len(reading.ids))
    return ActivationCache((ref.key, found[ref.key]) for ref in reading.plan.reads)


@dataclass(frozen=True)
class Reading:
    """What is to be read of which prompts, checked: `cache` reads it as one, `activations` part by part.

    Attributes:
        model: the model.
        ids: the prompts.
        plan: what is changed and read.
    """

    model: MambaModel
    ids: Int[Tensor, "B L"]
    plan: Plan

    @classmethod
    def make(
        cls,
        model: MambaModel,
        tokens: Tokens,
        sites: Iterable[str | tuple[str, int]],
        *,
        patches: Sequence[Patch | Cut] = (),
        positions: int | Sequence[int] | Int[Tensor, "B k"] | None = None,
    ) -> Reading:
        """Check what `cache` is given, and raise as it does."""
        if isinstance(sites, str):
            sites = [sites]
        if not isinstance(sites, Iterable):
            raise ValueError(f"sites are names or (name, layer) pairs, not {sites!r}")
        refs: list[SiteRef] = []
        for site in sites:
            info = model.known_sites().get(site) if isinstance(site, str) else None
            if info is None or info.owner == "model":
                refs.append(resolve(model, site))
            else:
                has = [layer for layer in range(model.n_layers) if site in model.layer_sites(layer)]
                refs += [resolve(model, site, layer) for layer in has or range(model.n_layers)]
        if not refs:
            raise ValueError("no site was named")
        ids, last = model.to_tokens(tokens)
        named = [ref.position for ref in refs if ref.position is not None]
        if positions is not None and named:
            raise ValueError(
                f"positions={positions!r} and an alias that names position {named[0]}: give one of the two"
            )
        for position in named:
            if position >= ids.shape[1]:
                raise ValueError(f"position {position} is outside the prompt's {ids.shape[1]} positions")
        keep = None if positions is None else kept_positions(ids, positions)
        refuse_ends(last, [positions])
        refuse_padding(last, named if keep is None else keep)
        plan = Plan.make(model, ids, patches, refs, keep)
        refuse_ends(last, named_positions(patches))
        return cls(model, ids, plan)

    def parts(self, rows: int | None, first: int = 0) -> list[slice]:
        """The rows to run at once, as `row_parts` has them, from the first on that is wanted."""
        ids, logits = self.ids[first:], self.plan.last == self.model.n_layers
        parts = row_parts(self.model, ids, self.plan, rows, logits=logits)
        return [slice(first + part.start, first + part.stop) for part in parts]

    def read(self, part: slice) -> dict[str, Tensor]:
        """What is read of some rows, by key."""
        return read_sites(self.model, self.ids[part], self.plan.rows(part, len(self.ids)))


def run(
    model: MambaModel,
    tokens: Tokens,
    patches: Sequence[Patch | Cut] = (),
    *,
    positions: Int[Tensor, "B"] | Literal["all"] | None = None,
    source: Tokens | None = None,
) -> Float[Tensor, "B V"] | Float[Tensor, "B L V"]:
    """The logits of one patched run; as many rows run at once as ``model.memory`` allows, and no result depends on it.

    Args:
        model: a model from `load_model`.
        tokens: token ids ``[B, L]``, a text, or texts (padded on the right).
        patches: what to change, in any order; at one site they apply in the order given.
        positions: where to read: None for the last column (of texts: each text's own last token), a LongTensor
            ``[B]`` for one position a row, ``"all"`` for logits ``[B, L, V]``.
        source: the prompts that a `Cut` with ``resample=True`` takes the writes of, row for row and of one shape.

    Raises:
        ValueError: for a patch at an unknown site, layer or position, or with a value that does not fit; for a position
            where one of the texts has ended.
    """
    ids, last = model.to_tokens(tokens)
    read = read_positions(ids, last if positions is None else positions)
    refuse_ends(last, [None if read is None else positions])
    refuse_padding(last, [] if read is None else read[:, None])
    other = source_tokens(model, ids, source)
    plan = Plan.make(model, ids, patches, (), resampled=other is not None)
    refuse_ends(last, named_positions(patches))
    keys = {key for change in plan.changes for key in change.resampled(ids.shape[1])}
    logits = None
    for part in row_parts(model, ids, plan, None, logits=read is None):
        own = plan.rows(part, len(ids))
        if other is not None:
            own = replace(own, source=source_values(model, other[part], keys))
        value = read_logits(model, ids[part], own, None if read is None else read[part])
        logits = _joined(logits, value, part, len(ids))
    assert logits is not None  # there is at least one row
    return logits


def named_positions(patches: Sequence[Patch | Cut]) -> list:
    """The positions that patches and cuts were given, of each reader."""
    lists = ([one.sources, one.targets] if isinstance(one, Cut) else [one.positions] for one in patches)
    return [positions for some in lists for positions in some]


def source_tokens(model: MambaModel, ids: Int[Tensor, "B L"], source: Tokens | None) -> Int[Tensor, "B L"] | None:
    """The source prompts' token ids, row for row.

    Raises:
        ValueError: if their shape is not that of the prompts.
    """
    if source is None:
        return None
    found, _ = model.to_tokens(source)
    if found.shape != ids.shape:
        raise ValueError(f"source tokens have the shape of tokens, {tuple(ids.shape)}, not {tuple(found.shape)}")
    return found


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
        touched = {one.site for one in (*plan.changes, *plan.reads)}
        row = forward_bytes(model, length) + 3 * max((site_bytes(model, site, length) for site in touched), default=0)
        columns = length if plan.keep is None else plan.keep.shape[1]
        row += sum(site_bytes(model, ref.site, columns if ref.position is None else 1) for ref in plan.reads)
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
