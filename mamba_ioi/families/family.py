"""What a family of models says of itself: its parts' names, its sizes, and which activations each layer has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnsight import Envoy
from torch import nn

from ..trace.blocks import BlockEnvoy
from ..trace.hybrid import HybridEnvoy, hybrid_table, layout_sites
from ..trace.served import ServedEnvoy
from ..trace.sites import SITES, Conv1dEnvoy, DtProjEnvoy, InProjEnvoy, LayerEnvoy, MixerEnvoy, SiteInfo


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: the config's ``model_type``.
        classes: the mixer and the blocks, imported when they are asked for; None where layers hold no scan.
        mixer: the envoy of a mixer, which says where ``delta_1``, ``B`` and ``C`` are served.
        block: the envoy of a block.
        sizes: the size of each letter that shapes are written in, given the config.
        infos: the table of sites of all its layers, by name.
        kind: what a layer is, given its block: its parts, joined by ``+``.
        sites: which sites a layer has, given its block, in execution order; None for all of ``infos``.
    """

    model_type: str
    classes: Callable[[], tuple[type[nn.Module], ...]] | None = None
    mixer: type[Envoy] = MixerEnvoy
    block: type[Envoy] = LayerEnvoy
    sizes: Callable[[Any], dict[str, int]] = lambda config: {}
    infos: Mapping[str, SiteInfo] = field(default_factory=lambda: SITES)
    kind: Callable[[nn.Module], str] = lambda block: "mamba"
    sites: Callable[[nn.Module], tuple[str, ...]] | None = None

    @property
    def has_scans(self) -> bool:
        """Whether its layers hold a scan, with the sites inside."""
        return self.classes is not None

    def includes(self, module: nn.Module) -> bool:
        """Whether a model of this ``model_type`` has the mixers that the family's sites are served by."""
        if self.classes is None:
            return True
        mixer = self.classes()[0]
        return any(isinstance(part, mixer) for part in module.modules())

    def envoys(self) -> dict[type | str, type[Envoy]]:
        """The envoy class of each module, for nnsight."""
        if self.classes is None:
            return {"layers.*": BlockEnvoy, "h.*": BlockEnvoy, "blocks.*": BlockEnvoy, "*": ServedEnvoy}
        mixer, *blocks = self.classes()
        parts = {"in_proj": InProjEnvoy, "conv1d": Conv1dEnvoy, "dt_proj": DtProjEnvoy}
        return {
            mixer: self.mixer,
            **dict.fromkeys(blocks, self.block),
            **{f"{name}.{part}": envoy for name in ("mixer", "mamba") for part, envoy in parts.items()},
            "*": ServedEnvoy,
        }

    @classmethod
    def hybrid(
        cls,
        model_type: str,
        classes: Callable[[], tuple[type[nn.Module], ...]],
        block: type[HybridEnvoy],
        sizes: Callable[[Any], dict[str, int]],
    ) -> Family:
        """A family of blocks of several parts, each with the sites that its layout gives."""
        return cls(
            model_type,
            classes=classes,
            mixer=block.inside,
            block=block,
            sizes=sizes,
            infos=hybrid_table(block.inside),
            kind=lambda module: block.layout_of(module).kinds,
            sites=lambda module: layout_sites(block.layout_of(module), block.inside.inside),
        )

    def tables(self, layers: Iterable[Envoy]) -> list[dict[str, SiteInfo]]:
        """Each layer's sites by name, in execution order; layers with the same ones share a table."""
        every = tuple(name for name, site in self.infos.items() if site.owner != "model")
        names = [every if self.sites is None else self.sites(layer._module) for layer in layers]
        shared = {some: {name: self.infos[name] for name in some} for some in dict.fromkeys(names)}
        return [shared[some] for some in names]


def s6_sizes(config) -> dict[str, int]:
    """The sizes of a Mamba, by Mamba's names of them."""
    names = {"E": "intermediate_size", "N": "state_size", "R": "time_step_rank", "K": "conv_kernel"}
    return {letter: int(getattr(config, name)) for letter, name in names.items()}


def ssd_sizes(heads: int, head_size: int, groups: int, state: int, taps: int) -> dict[str, int]:
    """The sizes of a Mamba-2: E = H P, and X = E + 2 G N channels of the conv."""
    inner = heads * head_size
    return {"E": inner, "H": heads, "P": head_size, "G": groups, "N": state, "K": taps, "X": inner + 2 * groups * state}


def hybrid_sizes(config) -> dict[str, int]:
    """The sizes of the Mamba-2 mixers of several hybrids, by the names that these give them."""
    heads, groups = (config.mamba_n_heads, config.mamba_d_head), config.mamba_n_groups
    return ssd_sizes(*heads, groups, config.mamba_d_state, config.mamba_d_conv)
