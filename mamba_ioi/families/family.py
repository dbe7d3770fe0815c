"""What a family of models says of itself: its parts' names, its sizes, and which activations each layer has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from nnsight import Envoy
from torch import nn

from ..trace.blocks import BlockEnvoy
from ..trace.served import ServedEnvoy
from ..trace.sites import SITES, Conv1dEnvoy, DtProjEnvoy, InProjEnvoy, LayerEnvoy, MixerEnvoy, SiteInfo


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: the config's ``model_type``.
        classes: the mixer and the block, imported when they are asked for; None where layers hold no scan.
        mixer: the envoy of a mixer, which says where ``delta_1``, ``B`` and ``C`` are served.
        block: the envoy of a block.
        sizes: the config's field of each letter that shapes are written in.
        infos: the table of sites of all its layers, by name.
        kind: what a layer is, given its block: its parts, joined by ``+``.
        sites: which sites a layer has, given its block, in execution order.
    """

    model_type: str
    classes: Callable[[], tuple[type[nn.Module], type[nn.Module]]] | None = None
    mixer: type[Envoy] = MixerEnvoy
    block: type[Envoy] = LayerEnvoy
    sizes: Mapping[str, str] = field(default_factory=dict)
    infos: Mapping[str, SiteInfo] = field(default_factory=lambda: SITES)
    kind: Callable[[nn.Module], str] = lambda block: "mamba"
    sites: Callable[[nn.Module], tuple[str, ...]] = lambda block: LAYER_SITES

    @property
    def has_scans(self) -> bool:
        """Whether its layers hold a scan, with the sites inside."""
        return self.classes is not None

    def includes(self, module: nn.Module) -> bool:
        """Whether a model of this ``model_type`` has the mixers that the family's sites are served by."""
        if self.classes is None:
            return True
        mixer, _ = self.classes()
        return any(isinstance(part, mixer) for part in module.modules())

    def envoys(self) -> dict[type | str, type[Envoy]]:
        """The envoy class of each module, for nnsight."""
        if self.classes is None:
            return {"layers.*": BlockEnvoy, "h.*": BlockEnvoy, "blocks.*": BlockEnvoy, "*": ServedEnvoy}
        mixer, block = self.classes()
        return {
            mixer: self.mixer,
            block: self.block,
            "mixer.in_proj": InProjEnvoy,
            "mixer.conv1d": Conv1dEnvoy,
            "mixer.dt_proj": DtProjEnvoy,
            "*": ServedEnvoy,
        }

    def tables(self, layers: Iterable[Envoy]) -> list[dict[str, SiteInfo]]:
        """Each layer's sites by name, in execution order; layers with the same ones share a table."""
        names = [self.sites(layer._module) for layer in layers]
        shared = {some: {name: self.infos[name] for name in some} for some in dict.fromkeys(names)}
        return [shared[some] for some in names]

    def measures(self, config) -> dict[str, int]:
        """The sizes by letter, as the config has them."""
        return {letter: int(getattr(config, name)) for letter, name in self.sizes.items()}


LAYER_SITES = tuple(name for name, site in SITES.items() if site.owner != "model")
"""The sites of a layer with a selective scan."""
S6_SIZES = {"E": "intermediate_size", "N": "state_size", "R": "time_step_rank", "K": "conv_kernel"}
"""Mamba's names of its sizes."""
