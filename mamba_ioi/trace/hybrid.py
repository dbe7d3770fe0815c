"""Layers of several parts: a mixer, attention, an MLP or experts, one after another or side by side.

A family says by a `Layout` what the parts of a block are called and by what each is multiplied; the sites are found
by that. This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from nnsight import Envoy
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn

from .anatomy import first_of, stream_of, with_first, with_stream
from .location import Site, note_visit
from .sites import LayerEnvoy, ScanMixerEnvoy, SiteInfo, site_table
from .stages import Stages, cast


@dataclass(frozen=True)
class Part:
    """One part of a block.

    Attributes:
        norm: the path of the norm before it.
        path: the path of its module, of whose output the first tensor is added to the stream.
        scale: what that is multiplied by.
        beside: the path of a module whose output is added to the part's, computed just before it; empty if none.
        inside: what its input is multiplied by after the norm.
    """

    norm: str
    path: str
    scale: float = 1.0
    beside: str = ""
    inside: float = 1.0


@dataclass(frozen=True)
class Layout:
    """The parts of a block, None where it has no such.

    Attributes:
        mixer: the scan's mixer.
        attn: the attention.
        mlp: the MLP, or the experts.
        follows: whether the MLP reads the stream with what comes before it; else the parts stand side by side.
        shared: whether the parts that stand side by side read the stream by one norm.
        kinds: what the parts are, in order of execution, joined by ``+``.
    """

    mixer: Part | None = None
    attn: Part | None = None
    mlp: Part | None = None
    follows: bool = True
    shared: bool = False
    kinds: str = ""

    def shares(self, part: str) -> bool:
        """Whether a part reads the stream by a norm that others read it by as well."""
        return self.shared and not (part == "mlp" and self.follows)


class LayoutSite(Site):
    """A `Site` at one of a block's parts, by its name in the layout: ``mixer.in_proj.output``, ``mlp_norm.input``."""

    def _location(self, obj: Any) -> str:
        part, _, rest = self.key.partition(".")
        part, _, what = part.partition("_")
        place = getattr(obj.layout, part)
        path = place.norm if what == "norm" else place.path
        return f"{obj.path}.{path}.{rest}"

    def place(self, obj: Any):
        if obj.layout.shared:
            keep_stream(obj)
        return self._location(obj), note_visit(obj.mixer) if self.key.startswith("mixer.") else None


class InputSite(LayoutSite):
    """A part's own copy of the stream, before its norm: a change reaches this part alone.

    Where the norm is shared, read is what the norm was given, which is kept for it (`note_stream`), and written is what
    the part is given, which is the norm of the new value.
    """

    def _location(self, obj: Any) -> str:
        part = getattr(obj.layout, self.key)
        return f"{obj.path}.{part.path if obj.layout.shares(self.key) else part.norm}.input"

    def place(self, obj: Any):
        shared = obj.layout.shares(self.key)
        if shared:
            note_stream(obj)
        return self._location(obj), note_visit(obj.mixer) if shared and self.key == "mixer" else None

    def see(self, obj, raw, visit):
        return (note_stream(obj) if obj.layout.shares(self.key) else first_of(raw)).clone()


def put_input(part: str, block: Any, view: Tensor, raw: Any) -> Any:
    """The call that a part's own copy of the stream is written into, with another value in place."""
    if block.layout.shares(part):
        view = norm_of(block)(view) * getattr(block.layout, part).inside
    return with_first(raw, cast(view, first_of(raw)))


class NormSite(LayoutSite):
    """A mixer's input after its norm: the norm's output, or where that is shared what the mixer is given."""

    def _location(self, obj: Any) -> str:
        mixer = obj.layout.mixer
        return f"{obj.path}.{mixer.path}.input" if obj.layout.shared else f"{obj.path}.{mixer.norm}.output"

    def place(self, obj: Any):
        shared = obj.layout.shared
        if shared:
            keep_stream(obj)
        return self._location(obj), note_visit(obj.mixer) if shared else None

    def see(self, obj, raw, visit):
        return (first_of(raw) if obj.layout.shared else raw).clone()


class BesideSite(LayoutSite):
    """What a part adds where another module's output is added to its own."""

    def _views(self, obj: Any):
        note_beside(obj)
        return Site._views(self, obj)


def shared_norm(block: Any) -> str:
    """The path of the norm that parts share."""
    return (block.layout.mixer or block.layout.attn).norm


def norm_of(block: Any) -> Envoy:
    """That norm."""
    return block.get(shared_norm(block))


def note_stream(block: Any) -> Tensor:
    """The stream that a shared norm is given at this visit, asked for once."""
    location = f"{block.path}.{shared_norm(block)}.input"
    return _noted(location, lambda: first_of(Mediator.value(location)))


def note_beside(block: Any) -> Tensor | float:
    """The output of the module beside the MLP at this visit, asked for once."""
    beside = block.layout.mlp.beside
    if not beside:
        return 0.0
    location = f"{block.path}.{beside}.output"
    return _noted(location, lambda: stream_of(Mediator.value(location)))


def keep_stream(block: Any) -> None:
    """Keep the stream that a shared norm is given, if the run has not passed it."""
    location = f"{block.path}.{shared_norm(block)}.input"
    mediator = Mediator.current(location)
    if mediator.occurrence(location) <= mediator.wanted(location):
        note_stream(block)


def _noted(location: str, ask: Any) -> Any:
    mediator = Mediator.current(location)
    kept: dict[tuple[str, int], Any] = mediator.__dict__.setdefault("noted_by_layouts", {})
    key = location, mediator.wanted(location)
    if key not in kept:
        kept[key] = ask()
    return kept[key]


class HybridEnvoy(LayerEnvoy):
    """A block of several parts. Its class says how a module's `Layout` is found."""

    inside: ClassVar[type[ScanMixerEnvoy]]
    """The envoy of its mixers."""
    given_embeddings: ClassVar[bool] = False
    """Whether it is given the embeddings beside the stream, as its second argument."""

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        """What the parts of a block are."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """What its parts are."""
        return type(self).layout_of(self._module)

    @property
    def chains(self) -> dict[str, type[Stages]]:
        """The mixer's operations as chains of values, by their first site; none where there is no mixer."""
        return {} if self.layout.mixer is None else type(self.mixer).chains

    @property
    def mixer_scale(self) -> float:
        """What the mixer's output is multiplied by on its way to the residual stream; 1 where there is no mixer."""
        return 1.0 if self.layout.mixer is None else self.layout.mixer.scale

    def look_inside(self) -> None:
        """Let nnsight serve the operations inside the mixer."""
        if self.layout.mixer is not None:
            _ = self.mixer.source

    @property
    def mixer(self) -> Any:
        """The scan's mixer, whatever its module is called.

        Raises:
            ValueError: if the layer has none.
        """
        if self.layout.mixer is None:
            raise ValueError(f"{self.path} has no mixer with a scan: it is {self.layout.kinds}")
        return self.get(self.layout.mixer.path)

    @InputSite(key="mixer", description="the mixer's own copy of the residual stream, before its norm")
    def layer_input(self, value) -> Float[Tensor, "B L D"]:
        """What the mixer reads, before its norm: a change reaches the mixer only."""
        ...

    @layer_input.transform
    def layer_input(self, view, raw):
        return put_input("mixer", self, view, raw)

    @NormSite(key="mixer.normalized", description="the mixer's input after its norm")
    def normalized_input(self, value) -> Float[Tensor, "B L D"]:
        """The mixer's own input after the norm."""
        ...

    @normalized_input.transform
    def normalized_input(self, view, raw):
        return with_first(raw, cast(view, first_of(raw))) if self.layout.shared else cast(view, raw)

    @LayoutSite(key="mixer.in_proj.output", description="the conv's input")
    def in_proj(self, value) -> Float[Tensor, "B L X"]:
        """The conv branch of in_proj."""
        return self.mixer.branch(value).clone()

    @in_proj.transform
    def in_proj(self, view, raw):
        return self.mixer.with_branch(raw, view)

    @LayoutSite(key="mixer.out_proj.output", description="what the mixer adds to the residual stream")
    def out_proj(self, value) -> Float[Tensor, "B L D"]:
        """What the mixer adds to the residual stream, multipliers included."""
        return value * self.layout.mixer.scale  # pyright: ignore[reportOptionalMemberAccess]

    @out_proj.transform
    def out_proj(self, view, raw):
        return cast(view, raw) / self.layout.mixer.scale  # pyright: ignore[reportOptionalMemberAccess]

    @InputSite(key="attn", description="the attention's own copy of the residual stream, before its norm")
    def attn_in(self, value) -> Float[Tensor, "B L D"]:
        """What the attention reads: a change reaches it only."""
        ...

    @attn_in.transform
    def attn_in(self, view, raw):
        return put_input("attn", self, view, raw)

    @LayoutSite(key="attn.output", description="what the attention adds to the residual stream")
    def attn_out(self, value) -> Float[Tensor, "B L D"]:
        """What the attention adds to the residual stream, multipliers included."""
        return stream_of(value) * self.layout.attn.scale  # pyright: ignore[reportOptionalMemberAccess]

    @attn_out.transform
    def attn_out(self, view, raw):
        scale = self.layout.attn.scale  # pyright: ignore[reportOptionalMemberAccess]
        return with_stream(raw, cast(view, stream_of(raw)) / scale)

    @InputSite(key="mlp", description="the MLP's own copy of the residual stream, before its norm")
    def mlp_in(self, value) -> Float[Tensor, "B L D"]:
        """What the MLP or the experts read: a change reaches them only."""
        ...

    @mlp_in.transform
    def mlp_in(self, view, raw):
        return put_input("mlp", self, view, raw)

    @BesideSite(key="mlp.output", description="what the MLP adds to the residual stream")
    def mlp_out(self, value) -> Float[Tensor, "B L D"]:
        """What the MLP and the experts add to the residual stream, multipliers included."""
        return (stream_of(value) + note_beside(self)) * self.layout.mlp.scale  # pyright: ignore[reportOptionalMemberAccess]

    @mlp_out.transform
    def mlp_out(self, view, raw):
        scale = self.layout.mlp.scale  # pyright: ignore[reportOptionalMemberAccess]
        return with_stream(raw, cast(view, stream_of(raw)) / scale - note_beside(self))


def layout_sites(layout: Layout, inside: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names of a block's sites, in execution order, given the sites inside its mixer."""
    names = ["resid_pre"]
    if layout.mixer is not None:
        mixer = ("skip" if name == "gate" else name for name in inside)
        names += ["layer_input", "normalized_input", "in_proj", *mixer, "out_proj"]
    if layout.attn is not None:
        names += ["attn_in", "attn_out"]
    if layout.mlp is not None:
        names += [*(["resid_mid"] if layout.follows and (layout.mixer or layout.attn) else []), "mlp_in", "mlp_out"]
    return (*names, "resid_post")


PART_SITES = {
    **site_table([(HybridEnvoy, name) for name in ("attn_in", "attn_out")]),
    "resid_mid": SiteInfo("resid_mid", "layer", "mlp_in", ("B", "L", "D"), "the residual stream before the MLP"),
    **site_table([(HybridEnvoy, name) for name in ("mlp_in", "mlp_out")]),
}
"""The sites of a block's attention and MLP. ``resid_mid`` is read where the MLP reads it; a change of it is in what the
MLP reads and in the stream after the block."""


def hybrid_table(mixer: type[ScanMixerEnvoy]) -> dict[str, SiteInfo]:
    """The sites of all blocks of a family by name, in execution order, given the envoy of its mixers."""
    rows = [(HybridEnvoy, name) for name in ("resid_pre", "layer_input", "normalized_input", "in_proj")]
    rows += [*((mixer, name) for name in mixer.inside), (HybridEnvoy, "out_proj")]
    table = site_table(rows)
    table["in_proj"] = replace(table["in_proj"], shape=table["conv"].shape)  # as many channels as the conv has
    return table | PART_SITES | site_table([(HybridEnvoy, "resid_post")])
