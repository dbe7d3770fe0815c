"""Layers of several parts: a mixer, attention, an MLP or experts, one after another or side by side.

A family says by a `Layout` what the parts of a block are called and by what each is multiplied; the sites are found
by that. This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from nnsight import Envoy
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn

from .anatomy import stream_of
from .blocks import first_of, with_first, with_stream
from .location import Site, note_visit
from .served import ServedEnvoy
from .sites import SiteInfo, site_table
from .stages import Stages, cast


@dataclass(frozen=True)
class Part:
    """One part of a block.

    Attributes:
        norm: the path of the norm before it.
        path: the path of its module, of whose output the first tensor is added to the stream.
        scale: what that is multiplied by.
        beside: the path of a module whose output is added to the part's, computed just before it; empty if none.
    """

    norm: str
    path: str
    scale: float = 1.0
    beside: str = ""


@dataclass(frozen=True)
class Layout:
    """The parts of a block, None where it has no such.

    Attributes:
        mixer: the scan's mixer.
        attn: the attention.
        mlp: the MLP, or the experts.
        parallel: whether mixer and attention read the stream by one norm, side by side.
        kinds: what the parts are, in order of execution, joined by ``+``.
    """

    mixer: Part | None = None
    attn: Part | None = None
    mlp: Part | None = None
    parallel: bool = False
    kinds: str = ""


class LayoutSite(Site):
    """A `Site` at one of a block's parts, by its name in the layout: ``mixer.in_proj.output``, ``mlp_norm.input``."""

    def _location(self, obj: Any) -> str:
        part, _, rest = self.key.partition(".")
        part, _, what = part.partition("_")
        place = getattr(obj.layout, part)
        path = place.norm if what == "norm" else place.path
        return f"{obj.path}.{path}.{rest}"

    def place(self, obj: Any):
        return self._location(obj), note_visit(obj.mixer) if self.key.startswith("mixer.") else None


class OwnInput(LayoutSite):
    """A part's own copy of the stream, where a norm is shared: what is written reaches this part alone, by the norm.

    Read is what the norm was given, which is kept for it (`note_stream`); written is what the part is given.
    """

    def _views(self, obj: Any):
        note_stream(obj)
        return Site._views(self, obj)

    def see(self, obj, raw, visit):
        return note_stream(obj).clone()


class BesideSite(LayoutSite):
    """What a part adds where another module's output is added to its own."""

    def _views(self, obj: Any):
        note_beside(obj)
        return Site._views(self, obj)


def note_stream(block: Envoy) -> Tensor:
    """The stream that a shared norm is given at this visit, asked for once."""
    location = f"{block.path}.{block.layout.mixer.norm}.input"
    return _noted(location, lambda: first_of(Mediator.value(location)))


def note_beside(block: Envoy) -> Tensor | float:
    """The output of the module beside the MLP at this visit, asked for once."""
    beside = block.layout.mlp.beside
    if not beside:
        return 0.0
    location = f"{block.path}.{beside}.output"
    return _noted(location, lambda: stream_of(Mediator.value(location)))


def keep_stream(block: Envoy) -> None:
    """Keep the stream that a shared norm is given, if the run has not passed it."""
    location = f"{block.path}.{block.layout.mixer.norm}.input"
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


class HybridEnvoy(ServedEnvoy):
    """A block of several parts. Its class says how a module's `Layout` is found."""

    inside: ClassVar[type[Envoy]]
    """The envoy of its mixers."""

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

    @Site(key="input", description="the residual stream before the layer")
    def resid_pre(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream before the layer; a change stays in the stream."""
        return first_of(value).clone()

    @resid_pre.transform
    def resid_pre(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @LayoutSite(key="mixer_norm.input", description="the mixer's own copy of the residual stream")
    def layer_input(self, value) -> Float[Tensor, "B L D"]:
        """What the mixer reads, before its norm: a change reaches the mixer only."""
        return first_of(value).clone()

    @layer_input.transform
    def layer_input(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @LayoutSite(key="mixer_norm.output", description="the mixer's input after its norm")
    def normalized_input(self, value) -> Float[Tensor, "B L D"]:
        """The mixer's input after its norm."""
        return value.clone()

    @normalized_input.transform
    def normalized_input(self, view, raw):
        return cast(view, raw)

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

    @LayoutSite(key="attn_norm.input", description="the attention's own copy of the residual stream, before its norm")
    def attn_in(self, value) -> Float[Tensor, "B L D"]:
        """What the attention reads: a change reaches it only."""
        return first_of(value).clone()

    @attn_in.transform
    def attn_in(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @LayoutSite(key="attn.output", description="what the attention adds to the residual stream")
    def attn_out(self, value) -> Float[Tensor, "B L D"]:
        """What the attention adds to the residual stream, multipliers included."""
        return stream_of(value) * self.layout.attn.scale  # pyright: ignore[reportOptionalMemberAccess]

    @attn_out.transform
    def attn_out(self, view, raw):
        scale = self.layout.attn.scale  # pyright: ignore[reportOptionalMemberAccess]
        return with_stream(raw, cast(view, stream_of(raw)) / scale)

    @LayoutSite(key="mlp_norm.input", description="the MLP's own copy of the residual stream, before its norm")
    def mlp_in(self, value) -> Float[Tensor, "B L D"]:
        """What the MLP or the experts read: a change reaches them only."""
        return first_of(value).clone()

    @mlp_in.transform
    def mlp_in(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @BesideSite(key="mlp.output", description="what the MLP adds to the residual stream")
    def mlp_out(self, value) -> Float[Tensor, "B L D"]:
        """What the MLP and the experts add to the residual stream, multipliers included."""
        return (stream_of(value) + note_beside(self)) * self.layout.mlp.scale  # pyright: ignore[reportOptionalMemberAccess]

    @mlp_out.transform
    def mlp_out(self, view, raw):
        scale = self.layout.mlp.scale  # pyright: ignore[reportOptionalMemberAccess]
        return with_stream(raw, cast(view, stream_of(raw)) / scale - note_beside(self))

    @Site(key="output", description="the residual stream after the layer")
    def resid_post(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream after the layer."""
        return stream_of(value).clone()

    @resid_post.transform
    def resid_post(self, view, raw):
        return with_stream(raw, cast(view, stream_of(raw)))


class ParallelEnvoy(HybridEnvoy):
    """A block whose mixer and attention read the stream by one norm, side by side."""

    @OwnInput(key="mixer.input", description="the mixer's own copy of the residual stream, before the shared norm")
    def layer_input(self, value) -> Float[Tensor, "B L D"]:
        """What the mixer reads, before the norm that it shares: a change reaches the mixer only."""
        ...

    @layer_input.transform
    def layer_input(self, view, raw):
        return with_first(raw, cast(self.get(self.layout.mixer.norm)(view), first_of(raw)))  # pyright: ignore

    @LayoutSite(key="mixer.input", description="the mixer's input after the norm")
    def normalized_input(self, value) -> Float[Tensor, "B L D"]:
        """The mixer's own input after the norm."""
        return first_of(value).clone()

    @normalized_input.transform
    def normalized_input(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @OwnInput(key="attn.input", description="the attention's own copy of the residual stream, before the shared norm")
    def attn_in(self, value) -> Float[Tensor, "B L D"]:
        """What the attention reads, before the norm that it shares: a change reaches it only."""
        ...

    @attn_in.transform
    def attn_in(self, view, raw):
        value = self.get(self.layout.mixer.norm)(view) * self.attention_in()  # pyright: ignore
        return with_first(raw, cast(value, first_of(raw)))

    def attention_in(self) -> float:
        """What the attention's input is multiplied by after the norm."""
        return 1.0


def hybrid_sites(block: type[HybridEnvoy], layout: Layout) -> tuple[str, ...]:
    """The names of a block's sites, in execution order."""
    inside = block.inside.inside  # pyright: ignore[reportAttributeAccessIssue]
    names = ["resid_pre"]
    if layout.mixer is not None:
        mixer = ("skip" if name == "gate" else name for name in inside)
        names += ["layer_input", "normalized_input", "in_proj", *mixer, "out_proj"]
    if layout.attn is not None:
        names += ["attn_in", "attn_out"]
    if layout.mlp is not None:
        names += [*(["resid_mid"] if layout.mixer or layout.attn else []), "mlp_in", "mlp_out"]
    return (*names, "resid_post")


def hybrid_table(block: type[HybridEnvoy]) -> dict[str, SiteInfo]:
    """The sites of all blocks of a family by name."""
    rows = ["resid_pre", "layer_input", "normalized_input", "in_proj", "out_proj"]
    rows += ["attn_in", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    table = site_table([(block.inside, name) for name in block.inside.inside] + [(block, name) for name in rows])  # pyright: ignore
    mid = SiteInfo("resid_mid", "layer", "mlp_in", ("B", "L", "D"), "the residual stream before the MLP")
    if "delta_1" in table:  # of S6 the conv has d_inner channels
        table["in_proj"] = SiteInfo("in_proj", "layer", "in_proj", ("B", "L", "E"), table["in_proj"].description)
    return table | {"resid_mid": mid}
