"""Where each activation of a Mamba lives in transformers and nnsight: the one place that knows.

Every named activation (a *site*, called as MambaLens calls its hooks, without ``hook_``) is a property of an
envoy, readable and writable inside any nnsight trace:

* on the model: ``embed``, ``norm``, ``logits``;
* on a layer: ``resid_pre``, ``layer_input``, ``normalized_input``, ``in_proj``, ``out_proj``, ``resid_post``;
* on a layer's ``mixer``: ``gate`` (the site ``skip``: under that name nnsight's method is read, and the gate assigned
  to), ``conv_slice``, ``conv``, ``ssm_input``, ``delta_1``, ``B``, ``C``, ``A``, ``delta_2``, ``delta``, ``A_bar``,
  ``B_bar``, ``write``, ``h_start``, ``h``, ``y``, ``ssm_output``, ``after_skip``, and the method ``scan``.

What is read is the reader's own copy: editing it in place, or assigning to the property, changes the run from
there on, and reading changes nothing. transformers >= 5.15 calls ``causal_conv1d_fn`` and ``mamba_selective_scan``
as functions inside the mixer and never runs ``conv1d`` and ``dt_proj`` as modules; their envoys serve their
``.output`` from where it is really computed.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from nnsight import Envoy
from torch import Tensor

from .anatomy import first_of, stream_of, with_first, with_stream
from .conv import ConvStages
from .location import Noted, OperationSite, OutputSite, PartSite, Site, StageSite, logits_of, open_stages, with_logits
from .s6 import S6Stages
from .served import ServedEnvoy, SkipMethod
from .stages import Stages, cast

if TYPE_CHECKING:
    from transformers.models.mamba.modeling_mamba import MambaMixer

# ---------------------------------------------------------------------------------------------------------------------
# The envoys
# ---------------------------------------------------------------------------------------------------------------------


class ScanMixerEnvoy(ServedEnvoy):
    """What mixers of all kinds have in common: one conv, one scan, and a gate."""

    is_mixer = True
    chains: ClassVar[dict[str, type[Stages]]]
    """The operations as chains of values, by their first site."""
    inside: ClassVar[tuple[str, ...]]
    """The sites inside, in execution order."""

    @property
    def skip(self) -> SkipMethod:
        """nnsight's method; what is assigned to it is the site of that name, `gate`."""
        return SkipMethod(self)

    @skip.setter
    def skip(self, value) -> None:
        self.gate = value  # pyright: ignore[reportAttributeAccessIssue]

    def scan(self, patch: Mapping[int, Tensor] | Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Run the slow scan in place of the model's own and return every state.

        That is ``[B, L, E, N]``; of a mixer with heads ``[B, L, H, P, N]``.

        Args:
            patch: a mapping position -> state (broadcastable to that of one position, ``[B, ...]``), or a callable
                ``(position, h [B, ...]) -> h`` called at every position in turn; later states follow.

        Raises:
            ValueError: for a position outside the prompt, or a patch of another type.
        """
        (stages,) = (one for one in self.chains.values() if one.KIND == "scan")
        return open_stages(self, stages).scan(patch)  # pyright: ignore[reportAttributeAccessIssue]

    def look_inside(self) -> None:
        """Let nnsight serve the operations inside."""
        _ = self.source


class MixerEnvoy(ScanMixerEnvoy):
    """A `MambaMixer`, with everything between its input projection and its output projection named."""

    _module: MambaMixer
    chains: ClassVar[dict[str, type[Stages]]] = {stages.ORDER[0]: stages for stages in (ConvStages, S6Stages)}
    inside: ClassVar[tuple[str, ...]] = (
        *("gate", "conv_slice", "conv", "ssm_input", "delta_1", "B", "C"),
        *S6Stages.ORDER,
    )

    @Site(key="in_proj.output", description="the gate before silu (site `skip`)")
    def gate(self, value) -> Float[Tensor, "B L E"]:
        """The gate, before silu: rows E to 2E of in_proj's output."""
        return value.chunk(2, dim=-1)[1].clone()

    @gate.transform
    def gate(self, view, raw):
        return torch.cat([raw.chunk(2, dim=-1)[0], cast(view, raw.chunk(2, dim=-1)[1])], dim=-1)

    @StageSite(ConvStages, description="the conv's terms for taps -3, -2, -1, 0")
    def conv_slice(self, value) -> Float[Tensor, "B L E K"]:
        """The conv's terms at each output position, bias excluded: their sum plus the bias is ``conv``."""
        ...

    @StageSite(ConvStages, description="the conv's output before silu, bias included")
    def conv(self, value) -> Float[Tensor, "B L E"]:
        """The conv's output before silu, bias included."""
        ...

    @OperationSite(ConvStages, description="the scan's input: the conv's output after silu")
    def ssm_input(self, value) -> Float[Tensor, "B L E"]:
        """The scan's input x: the conv's output after silu."""
        return value.transpose(1, 2).clone()

    @ssm_input.transform
    def ssm_input(self, view, raw):
        earlier = raw.shape[-1] - view.shape[1]
        view = view.transpose(1, 2)
        return torch.cat([raw[..., :earlier], view], dim=-1) if earlier else view

    @Site(key="x_proj.output", description="the time step before dt_proj")
    def delta_1(self, value) -> Float[Tensor, "B L R"]:
        """The time step's low-rank form, before dt_proj."""
        return self._split(value)[0].clone()

    @delta_1.transform
    def delta_1(self, view, raw):
        return self._replace(raw, 0, view)

    @Site(key="x_proj.output", description="B: how the input enters the state")
    def B(self, value) -> Float[Tensor, "B L N"]:
        """B of each position."""
        return self._split(value)[1].clone()

    @B.transform
    def B(self, view, raw):
        return self._replace(raw, 1, view)

    @Site(key="x_proj.output", description="C: how the state is read out")
    def C(self, value) -> Float[Tensor, "B L N"]:
        """C of each position."""
        return self._split(value)[2].clone()

    @C.transform
    def C(self, view, raw):
        return self._replace(raw, 2, view)

    @StageSite(S6Stages, description="A = -exp(A_log)")
    def A(self, value) -> Float[Tensor, "E N"]:
        """A of the recurrence, the same at every position and for every row."""
        ...

    @StageSite(S6Stages, description="the time step before softplus, bias included")
    def delta_2(self, value) -> Float[Tensor, "B L E"]:
        """The time step before softplus: dt_proj's output, bias included."""
        ...

    @StageSite(S6Stages, description="the time step after softplus")
    def delta(self, value) -> Float[Tensor, "B L E"]:
        """The time step, after softplus."""
        ...

    @StageSite(S6Stages, description="exp(delta A)")
    def A_bar(self, value) -> Float[Tensor, "B L E N"]:
        """The discretized A."""
        ...

    @StageSite(S6Stages, description="delta B")
    def B_bar(self, value) -> Float[Tensor, "B L E N"]:
        """The discretized B."""
        ...

    @StageSite(S6Stages, description="B_bar x: what enters the state")
    def write(self, value) -> Float[Tensor, "B L E N"]:
        """What enters the state at each position; what is written takes the place of ``B_bar x``."""
        ...

    @StageSite(S6Stages, description="the state before the first position")
    def h_start(self, value) -> Float[Tensor, "B E N"]:
        """The state before the first position: zeros, unless it is written."""
        ...

    @StageSite(S6Stages, description="the state; where it is edited, later states follow")
    def h(self, value) -> Float[Tensor, "B L E N"]:
        """The state after each position. Positions whose value is changed are held; the states after them follow.

        Under gradients read it before y, ssm_output and after_skip: what was read of these before it gets no gradient.
        """
        ...

    @StageSite(S6Stages, description="C h")
    def y(self, value) -> Float[Tensor, "B L E"]:
        """The state read out by C."""
        ...

    @StageSite(S6Stages, description="y + x D")
    def ssm_output(self, value) -> Float[Tensor, "B L E"]:
        """The scan's output with the skip connection D."""
        ...

    @StageSite(S6Stages, description="ssm_output silu(gate): what out_proj receives")
    def after_skip(self, value) -> Float[Tensor, "B L E"]:
        """The gated output, which out_proj receives."""
        ...

    def branch(self, projected: Tensor) -> Float[Tensor, "B L E"]:
        """The conv branch of in_proj's output."""
        return projected.chunk(2, dim=-1)[0]

    def with_branch(self, projected: Tensor, view: Tensor) -> Tensor:
        """in_proj's output with another conv branch."""
        branch, gate = projected.chunk(2, dim=-1)
        return torch.cat([cast(view, branch), gate], dim=-1)

    def _split(self, value: Tensor) -> tuple[Tensor, ...]:
        n = self._module.ssm_state_size
        return value.split([value.shape[-1] - 2 * n, n, n], dim=-1)

    def _replace(self, raw: Tensor, index: int, view: Tensor) -> Tensor:
        parts = list(self._split(raw))
        parts[index] = cast(view, parts[index])
        return torch.cat(parts, dim=-1)


class InProjEnvoy(ServedEnvoy):
    """The mixer's ``in_proj``: whoever looks into a mixer from here on knows which step of a generation it is at."""

    input = Noted("input")  # pyright: ignore[reportAssignmentType]
    inputs = Noted("inputs")  # pyright: ignore[reportAssignmentType]
    output = Noted("output")  # pyright: ignore[reportAssignmentType]


class Conv1dEnvoy(ServedEnvoy):
    """The mixer's ``conv1d``, which transformers never calls: served where the convolution is really computed."""

    parent: Any  # a MixerEnvoy

    @property
    def output(self) -> Float[Tensor, "B E L"]:
        """The conv's output before silu, bias included, channels first (the site ``conv``, transposed)."""
        return self.parent.conv.transpose(1, 2)

    @output.setter
    def output(self, value) -> None:
        self.parent.conv = value.transpose(1, 2)

    @property
    def input(self) -> Float[Tensor, "B E L"]:
        """The conv branch of in_proj, channels first (the site ``in_proj``, transposed)."""
        return self.parent.parent.in_proj.transpose(1, 2)

    @input.setter
    def input(self, value) -> None:
        self.parent.parent.in_proj = value.transpose(1, 2)


class DtProjEnvoy(ServedEnvoy):
    """The mixer's ``dt_proj``, which transformers never calls: served where its product is really computed."""

    parent: Any  # a MixerEnvoy

    @property
    def output(self) -> Float[Tensor, "B L E"]:
        """The time step before softplus, bias included (the site ``delta_2``)."""
        return self.parent.delta_2

    @output.setter
    def output(self, value) -> None:
        self.parent.delta_2 = value

    @property
    def input(self) -> Float[Tensor, "B L R"]:
        """What dt_proj multiplies (the site ``delta_1``)."""
        return self.parent.delta_1

    @input.setter
    def input(self, value) -> None:
        self.parent.delta_1 = value


class LayerEnvoy(ServedEnvoy):
    """A `MambaBlock`: the residual stream before and after, and what the layer reads from it and adds to it."""

    @property
    def chains(self) -> dict[str, type[Stages]]:
        """The mixer's operations as chains of values, by their first site."""
        return type(self.mixer).chains

    @property
    def mixer_scale(self) -> float:
        """What the mixer's output is multiplied by on its way to the residual stream."""
        return 1.0

    def look_inside(self) -> None:
        """Let nnsight serve the operations inside the mixer."""
        _ = self.mixer.source

    @Site(key="input", description="the residual stream before the layer")
    def resid_pre(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream before the layer; a change stays in the stream."""
        return first_of(value).clone()

    @resid_pre.transform
    def resid_pre(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @Site(key="norm.input", description="the layer's own copy of the residual stream")
    def layer_input(self, value) -> Float[Tensor, "B L D"]:
        """What this layer reads: a change reaches this layer only, not the residual stream."""
        return first_of(value).clone()

    @layer_input.transform
    def layer_input(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @Site(key="norm.output", description="the layer's input after RMSNorm")
    def normalized_input(self, value) -> Float[Tensor, "B L D"]:
        """The layer's input after RMSNorm."""
        return value.clone()

    @normalized_input.transform
    def normalized_input(self, view, raw):
        return cast(view, raw)

    @Site(key="mixer.in_proj.output", description="the conv's input: the first half of the input projection")
    def in_proj(self, value) -> Float[Tensor, "B L E"]:
        """The conv branch: rows 0 to E of in_proj's output."""
        return self.mixer.branch(value).clone()

    @in_proj.transform
    def in_proj(self, view, raw):
        return self.mixer.with_branch(raw, view)

    @Site(key="mixer.out_proj.output", description="what the layer adds to the residual stream")
    def out_proj(self, value) -> Float[Tensor, "B L D"]:
        """What the layer adds to the residual stream."""
        return value.clone()

    @out_proj.transform
    def out_proj(self, view, raw):
        return cast(view, raw)

    @Site(key="output", description="the residual stream after the layer")
    def resid_post(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream after the layer."""
        return stream_of(value).clone()

    @resid_post.transform
    def resid_post(self, view, raw):
        return with_stream(raw, cast(view, stream_of(raw)))


class ModelSites(Envoy):
    """The sites outside the layers, as properties of the model."""

    @PartSite(key="embed", description="the token embeddings")
    def embed(self, value) -> Float[Tensor, "B L D"]:
        """The token embeddings, times their multiplier if the model has one: the start of the residual stream."""
        return value * self.anatomy.scale

    @embed.transform
    def embed(self, view, raw):
        return cast(view, raw) / self.anatomy.scale

    @PartSite(key="norm", description="the residual stream after the final RMSNorm")
    def norm(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream after the final RMSNorm, which the unembedding receives."""
        return value.clone()

    @norm.transform
    def norm(self, view, raw):
        return cast(view, raw)

    @OutputSite(key="output", description="the logits: the model's output")
    def logits(self, value) -> Float[Tensor, "B L V"]:
        """The logits of the model's output."""
        return logits_of(value).clone()

    @logits.transform
    def logits(self, view, raw):
        return with_logits(raw, cast(view, logits_of(raw)))


# ---------------------------------------------------------------------------------------------------------------------
# The table of sites
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteInfo:
    """One row of the table of sites.

    Attributes:
        name: the site's name (MambaLens's hook name without ``hook_``).
        owner: the envoy that has it: ``model``, ``layer`` or ``mixer``.
        attribute: the property's name there.
        shape: its dimensions, one letter each; ``K`` is the conv's taps.
        description: what it is.
    """

    name: str
    owner: str
    attribute: str
    shape: tuple[str, ...]
    description: str

    @property
    def by_position(self) -> bool:
        """Whether the site has a value at each position."""
        return "L" in self.shape


def site_table(rows: Iterable[tuple[type[Envoy], str]]) -> dict[str, SiteInfo]:
    """A table of sites by name, read off the envoys' properties.

    Args:
        rows: the envoy's class and the property's name, in execution order.
    """
    table = {}
    for cls, attribute in rows:
        descriptor = next(vars(base)[attribute] for base in cls.__mro__ if attribute in vars(base))
        name = "skip" if attribute == "gate" else attribute
        hint = descriptor._preprocess.__annotations__["return"]
        shape = tuple(hint.replace('"', "'").split("'")[1].split())
        owner = "model" if issubclass(cls, ModelSites) else "mixer" if getattr(cls, "is_mixer", False) else "layer"
        table[name] = SiteInfo(name, owner, attribute, shape, descriptor.description)
    return table


def layer_table(block: type[LayerEnvoy], mixer: type[ScanMixerEnvoy]) -> dict[str, SiteInfo]:
    """The sites of a layer whose mixer is all that it has, in execution order, and those around the layers."""
    before, after = ("resid_pre", "layer_input", "normalized_input", "in_proj"), ("out_proj", "resid_post")
    rows = [(ModelSites, "embed"), *((block, name) for name in before)]
    rows += [(mixer, name) for name in mixer.inside]
    rows += [*((block, name) for name in after), (ModelSites, "norm"), (ModelSites, "logits")]
    return site_table(rows)


SITES: dict[str, SiteInfo] = layer_table(LayerEnvoy, MixerEnvoy)
"""Every site of a Mamba by name, in execution order."""
MODEL_SITES = {name: site for name, site in SITES.items() if site.owner == "model"}
"""The sites outside the layers."""


def owner(model, site: SiteInfo, layer: int | None) -> Envoy:
    """The envoy that has the site."""
    if site.owner == "model":
        return model
    block = model.layers[layer]
    return block if site.owner == "layer" else block.mixer


def missing_operations(mixer: Envoy) -> list[str]:
    """The operations that the sites stand on and this mixer's forward does not have."""
    names = [operation.name for operation in mixer.source]
    chains = type(mixer).chains.values()  # pyright: ignore[reportAttributeAccessIssue]
    needed = [stages.operation(single).removeprefix("source.") for stages in chains for single in (False, True)]
    return [operation for operation in needed if operation not in names]
