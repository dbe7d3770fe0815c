"""What to change in a run: `Patch` and `Resample`, checked against the model and its prompts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ..checks import integer, real_number, scalar
from ..trace.change import Change
from ..trace.sites import SiteInfo
from .positions import common_positions, own_positions

if TYPE_CHECKING:
    from ..models.model import MambaModel

_ALIAS = re.compile(r"(?:blocks\.(\d+)\.)?hook_([A-Za-z_]+?(?:_\d)?)(?:\.(\d+))?$")


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

    In `run` and `cache`, and in sweeps with callables, gradients flow into tensors that ``value`` is, or that a
    callable computes with, where they ask for them and torch has gradients on; into the model's weights flow none.

    Attributes:
        site: a site's name or a full alias (``blocks.39.hook_h.7``, which also says layer and position).
        layer: the layer, counted from 0; None for ``embed``, ``norm`` and ``logits``.
        value: a number, or a tensor or numpy array broadcastable to the site at those positions:
            ``[B, len(positions), ...]`` (``[E, N]`` for ``A``; with ``slice``, ``[B, len(positions), E]``; with
            ``channels``, as many of them as there are; under an alias with a position the position's dimension may be
            left out). Or a callable that is given a copy of what is there, of that shape, and returns what takes its
            place; at ``h`` it is called position by position, ``[B, 1, E, N]``, with the state as it has become.
        positions: the positions to change, counted from 0 (negative: from the end); None for all of them. Or each
            row's own, a LongTensor ``[B, k]`` counted from 0, -1 for none: values are then ``[B, k, ...]``, and a
            callable sees that (of a row that has none, what it sees is no matter, and what it returns is not used).
            Patched states (``h``) hold at their positions and the states after them follow.
        slice: for ``conv_slice``, the one tap to change: -3, -2, -1 or 0. The term at *output* position p that comes
            from ``in_proj`` at p + slice is replaced.
        channels: where x, B and C pass through one conv (in a Mamba-2), the channels to change: ``"x"``, ``"B"`` or
            ``"C"`` of ``in_proj``, ``conv_slice`` or ``conv``; None for all of them.
        add: add ``value`` to what is there, instead of putting it in its place: a steering vector. A state (``h``) is
            added to as it has become.
    """

    site: str
    layer: int | None
    value: Tensor | float | Callable[[Tensor], Tensor | float]
    positions: int | Sequence[int] | Int[Tensor, "B k"] | None = None
    slice: int | None = None
    channels: str | None = None
    add: bool = False


@dataclass(frozen=True)
class Resample:
    """A `Patch` whose value is that of the same site in the run on the source (corrupt) tokens."""

    site: str
    layer: int | None
    positions: int | Sequence[int] | Int[Tensor, "B k"] | None = None
    slice: int | None = None
    channels: str | None = None


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
    known = model.known_sites()
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
    model.require_site(name, layer)
    info = info if layer is None else model.layer_sites(layer)[name]
    if position is not None and not info.by_position:
        raise ValueError(f"the site {name!r} has no positions, but {site!r} names position {position}")
    return SiteRef(info, layer, position)


def check_patch(model: MambaModel, ids: Int[Tensor, "B L"], patch: Patch | Resample) -> Change:
    """The change that a patch makes, or a sentence that says what would be right."""
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
        positions = own if own is not None else common_positions(positions, length)
    part = () if patch.channels is None else (some_channels(model, site, patch.channels),)
    if patch.slice is not None:
        taps = range(1 - model.d_conv, 1) if model.has_scans else range(0)
        tap = integer(patch.slice)
        if tap is None or site.name != "conv_slice" or tap not in taps:
            raise ValueError(
                f"slice={patch.slice} at the site {site.name!r}: slices are {list(taps)}, at the site 'conv_slice'"
            )
        part = (*(part or (slice(None),)), tap - 1)
    elif part and site.name == "conv_slice":
        part = (*part, slice(None))
    count = length if positions is None else positions.shape[1] if isinstance(positions, Tensor) else len(positions)
    letters = {"B": batch, "L": count, **model.sizes()}
    whole = [letters[letter] for letter in site.shape]
    shape = list(torch.empty(whole, device="meta")[(..., *part)].shape)
    value = _patch_value(patch.value) if isinstance(patch, Patch) else None
    add = isinstance(patch, Patch) and patch.add
    if not isinstance(add, bool):
        raise ValueError(f"add of a patch is True or False, not {add!r}")
    if add and callable(value):
        raise ValueError(
            "add=True adds a tensor or a number; a callable returns what takes the place of what it is given"
        )
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
        value = value.reshape((1,) * (len(shape) - value.dim()) + value.shape)
    return Change(ref.layer, site, value, positions, part, add=add)


def some_channels(model: MambaModel, site: SiteInfo, channels: str) -> slice:
    """Where the channels of x, B or C are among those of the conv.

    Raises:
        ValueError: for another word, or a site whose channels are not those of a conv that x, B and C pass through.
    """
    sizes = model.sizes()
    if "X" not in site.shape:
        raise ValueError(
            f"channels={channels!r} at the site {site.name!r} of {model.model_id}: those of x, B and C are told apart "
            "in a Mamba-2, at in_proj, conv_slice and conv"
        )
    shared = sizes["G"] * sizes["N"]
    ends = {"x": (0, sizes["E"]), "B": (sizes["E"], sizes["E"] + shared), "C": (sizes["E"] + shared, sizes["X"])}
    if not isinstance(channels, str) or channels not in ends:
        raise ValueError(f"channels are one of {', '.join(ends)}, or None for all of them, not {channels!r}")
    return slice(*ends[channels])


def _patch_value(given) -> Tensor | Callable:
    """What a patch puts in: a tensor or callable as it is, an array or a number as a tensor."""
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
        return torch.tensor(float(number), dtype=torch.float64)
    kind = value.dtype if isinstance(value, Tensor) else type(given).__name__
    raise ValueError(f"a patch's value is a real tensor, a number or a callable, not {kind}")
