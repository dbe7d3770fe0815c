"""The node-level experiments of the paper: each a function from a model and prompts to a `Result`.

The catalogue (`mamba_ioi.catalogue`) says which figure each is drawn in and what it is run with there; `EXPERIMENTS`
holds its rows by the experiments' names, to be called with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pkgutil import resolve_name
from typing import Any

from ..catalogue import CATALOGUE, Row
from ..models.model import CausalLM
from ..result import Result
from ..tasks.ioi import IOIDataset
from .bottleneck import bottleneck, default_layer
from .conv_slices import conv_slices
from .cross_talk import balanced_pairs, cross_talk
from .layer_removal import greedy_layer_removal, layer_removal
from .name_means import NameMeans, name_means
from .name_steering import name_pca, name_steering
from .resample_ablation import resample_ablation
from .state_similarity import example_prompts, state_similarity

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "NameMeans",
    "balanced_pairs",
    "bottleneck",
    "conv_slices",
    "cross_talk",
    "default_layer",
    "example_prompts",
    "greedy_layer_removal",
    "layer_removal",
    "name_means",
    "name_pca",
    "name_steering",
    "resample_ablation",
    "state_similarity",
]


@dataclass(frozen=True, kw_only=True)
class Experiment(Row):
    """A row of the catalogue, to be called with a model."""

    @property
    def work(self) -> Callable[..., Result]:
        """The experiment's function, imported when it is asked for."""
        return resolve_name(self.function) if isinstance(self.function, str) else self.function

    def __call__(
        self,
        model: CausalLM,
        *,
        pairs: int | None = None,
        seed: int = 27,
        layer: int | None = None,
        progress: bool = True,
    ) -> Result:
        """Draw the prompts and run.

        Args:
            model: the model, with its tokenizer.
            pairs: how many pairs, instead of its own number (where means of names are taken: times ``multiple``).
            seed: of the prompts; it is kept in ``meta``.
            layer: the layer to look at, instead of the bottleneck.
            progress: show bars.

        Raises:
            ValueError: as the experiment; or for a layer where the experiment goes through all of them.
        """
        function = self.work
        if layer is not None and not self.takes_layer:
            raise ValueError(f"{function.__name__} goes through all layers; layer={layer} has no meaning for it")
        arguments = dict(self.arguments)
        if "progress" in signature(function).parameters:
            arguments["progress"] = progress
        if self.takes_layer:
            arguments["layer"] = layer
        if self.input == "nothing":
            return function(model, **arguments)
        if self.input == "own":
            return function(model, pairs=pairs, seed=seed, **arguments)
        if model.tokenizer is None:
            raise ValueError(f"{model.model_id} has no tokenizer, which is needed to draw prompts")
        if self.needs_mamba:
            model.require_mamba(function.__name__)
        count = self.multiple * ((self.pairs or 0) if pairs is None else pairs)
        drawn: dict[str, Any] = {}
        match self.input:
            case "pairs":
                first = [IOIDataset.generate(model.tokenizer, count, seed=seed, templates=self.templates)]
                drawn = {"pairs": count, "templates": self.templates}
            case "balanced":
                first = [balanced_pairs(model.tokenizer, count, seed=seed)]
                drawn = {"pairs": count, "templates": self.templates}
            case "prompts":
                first = [example_prompts(model.tokenizer, seed=seed)]
                arguments["seed"] = seed
            case "names":
                first = []
                arguments |= {"n_pairs": count, "seed": seed}
        result = function(model, *first, **arguments)
        return Result(result.table, result.meta | {"seed": seed} | drawn)


EXPERIMENTS: dict[str, Experiment] = {
    row.experiment: Experiment(**vars(row)) for row in CATALOGUE.values() if row.input not in ("own", "nothing")
}
"""Every experiment on nodes by name, in the order of the paper's figures: a view of the catalogue."""
