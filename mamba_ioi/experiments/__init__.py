"""The node-level experiments of the paper: each a function from a model and prompts to a `Result`.

The catalogue (`mamba_ioi.catalogue`) says which figure each is drawn in and what it is run with there; `EXPERIMENTS`
holds its rows by the experiments' names, to be called with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pkgutil import resolve_name
from typing import Any

from ..catalogue import CATALOGUE, Row
from ..checks import whole_number
from ..models.model import CausalLM
from ..result import Result
from ..tasks import generate
from ..tasks.ioi_prompts import balanced_pairs, example_prompts
from ..tasks.pairs import PromptPairs
from .bottleneck import bottleneck, default_layer
from .conv_slices import conv_slices
from .cross_talk import cross_talk
from .direct_effects import direct_effects
from .feature_edges import feature_edges
from .feature_effects import feature_effects
from .feature_faithfulness import feature_faithfulness
from .knockout import knockout
from .layer_removal import greedy_layer_removal, layer_removal
from .logit_lens import logit_lens
from .means import Means, means
from .name_means import NameMeans, name_means
from .name_steering import name_pca, name_steering
from .probe import probe, probes
from .resample_ablation import resample_ablation
from .state_similarity import state_similarity

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Means",
    "NameMeans",
    "balanced_pairs",
    "bottleneck",
    "conv_slices",
    "cross_talk",
    "default_layer",
    "direct_effects",
    "example_prompts",
    "feature_edges",
    "feature_effects",
    "feature_faithfulness",
    "greedy_layer_removal",
    "knockout",
    "layer_removal",
    "logit_lens",
    "means",
    "name_means",
    "name_pca",
    "name_steering",
    "probe",
    "probes",
    "resample_ablation",
    "state_similarity",
]


PROMPTS = 3
"""How many of a task's prompts are looked at where each has a panel of its own."""


@dataclass(frozen=True, kw_only=True)
class Experiment(Row):
    """A row of the catalogue, to be called with a model and, for another task than the paper's, with its pairs."""

    @property
    def work(self) -> Callable[..., Result]:
        """The experiment's function, imported when it is asked for."""
        return resolve_name(self.function) if isinstance(self.function, str) else self.function

    def __call__(
        self,
        model: CausalLM,
        data: PromptPairs | None = None,
        *,
        held_out: PromptPairs | None = None,
        marks: Sequence[str] | None = None,
        pairs: int | None = None,
        seed: int = 27,
        layer: int | None = None,
        channels: str | None = None,
        progress: bool = True,
    ) -> Result:
        """Run on pairs of any task, or draw the paper's prompts and run on these.

        Args:
            model: the model, with its tokenizer.
            data: pairs of another task; None draws the paper's. Of an experiment on prompts, the first few.
            held_out: with ``data``, other pairs of that task, where the row says that it takes some; None: there are
                none.
            marks: with ``data``, go by these places; see `resample_ablation`.
            pairs: how many pairs are drawn, instead of its own number (where means of names are taken: times
                ``multiple``).
            seed: of the prompts that are drawn; it is kept in ``meta``.
            layer: the layer to look at, instead of the bottleneck.
            channels: those of a Mamba-2's conv that are resampled, instead of all; see `conv_slices`.
            progress: show bars.

        Raises:
            ValueError: as the experiment; for a layer where the experiment goes through all of them, channels where it
                tells none apart, marks where it knows none, or data where it speaks of the names in the paper's
                prompts.
        """
        function = self.work
        known = signature(function).parameters
        if layer is not None and not self.takes_layer:
            raise ValueError(f"{function.__name__} goes through all layers; layer={layer} has no meaning for it")
        if channels is not None and not self.takes_channels:
            raise ValueError(f"{function.__name__} tells no channels apart; channels={channels!r} has no meaning there")
        if marks is not None and ("marks" not in known or data is None):
            raise ValueError(f"{function.__name__} has no marks to go by, or no data that have them, not {marks!r}")
        arguments = dict(self.arguments)
        if "progress" in known:
            arguments["progress"] = progress
        if self.takes_layer:
            arguments["layer"] = layer
        if self.takes_channels:
            arguments["channels"] = channels
        if self.input == "nothing":
            return function(model, **arguments)
        if model.tokenizer is None:
            raise ValueError(f"{model.model_id} has no tokenizer, which is needed to draw prompts")
        if self.needs_mamba:
            model.require_mamba(function.__name__)
        if data is not None:
            if self.needs_names:
                raise ValueError(
                    f"{self.experiment} speaks of the names in the paper's prompts; it takes no other data"
                )
            arguments |= {} if marks is None else {"marks": marks}
            arguments |= {} if self.held_out is None else {"held_out": held_out}
            return function(model, data[:PROMPTS] if self.input == "prompts" else data, **arguments)
        drawn: dict[str, Any] = {}
        count = self.multiple * whole_number((self.pairs or 1) if pairs is None else pairs, "pairs", least=1)
        match self.input:
            case "pairs":
                first = [self._drawn(model, count, seed)]
                drawn = {"pairs": count, "templates": self.templates}
            case "balanced":
                first = [balanced_pairs(model.tokenizer, count, seed=seed)]
                drawn = {"pairs": count, "templates": self.templates}
            case "prompts":
                first = [example_prompts(model.tokenizer, seed=seed)]
                arguments["seed"] = seed
            case _:
                first = []
                arguments |= {"n_pairs": count, "seed": seed}
        if self.held_out is not None:
            arguments["held_out"] = self._drawn(model, self.held_out, int(seed) + 1)
        result = function(model, *first, **arguments)
        return Result(result.table, result.meta | {"seed": seed} | drawn)

    def _drawn(self, model: CausalLM, count: int, seed: int) -> PromptPairs:
        """So many of the paper's pairs, in both directions."""
        return generate("ioi", model.tokenizer, 2 * count, seed=seed, templates=self.templates, symmetric=True)


EXPERIMENTS: dict[str, Experiment] = {
    row.experiment: Experiment(**vars(row)) for row in CATALOGUE.values() if row.input != "nothing"
}
"""Every experiment by name, in the order of the paper's figures: a view of the catalogue."""
