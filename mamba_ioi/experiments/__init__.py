"""The node-level experiments of the paper: each a function from a model and prompts to a `Result`.

`EXPERIMENTS` holds them by name, with the figure they are drawn in and the parameters they are run with there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..dataset import IOIDataset
from ..model import CausalLM
from ..result import Result
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


@dataclass(frozen=True)
class Experiment:
    """An experiment with its figure's parameters, to be called with a model.

    Attributes:
        function: the experiment.
        figure: the figure that shows it, in the paper's numbering: ``fig4``; ``fig5_greedy`` for a second panel.
        input: what the function gets: ``pairs`` drawn uniformly, ``balanced`` pairs (as many of each template and
            corruption), ``prompts`` (a few texts), or ``names`` (nothing: it draws its own pairs).
        pairs: how many pairs are drawn (``balanced``: of each template and corruption), at least the paper's number.
        multiple: how many pairs to draw for each of ``pairs``, so that means over names are over enough of them.
        templates: which templates the pairs are of.
        takes_layer: whether it looks at one layer, the bottleneck unless one is named.
        needs_mamba: whether it works on Mambas only.
        arguments: more arguments of the function.
    """

    function: Callable[..., Result]
    figure: str
    input: Literal["pairs", "balanced", "prompts", "names"]
    pairs: int = 80
    multiple: int = 1
    templates: str = "aligned"
    takes_layer: bool = False
    needs_mamba: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

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
        if layer is not None and not self.takes_layer:
            raise ValueError(f"{self.function.__name__} goes through all layers; layer={layer} has no meaning for it")
        if model.tokenizer is None:
            raise ValueError(f"{model.model_id} has no tokenizer, which is needed to draw prompts")
        if self.needs_mamba:
            model.require_mamba(self.function.__name__)
        pairs = self.multiple * (self.pairs if pairs is None else pairs)
        arguments = {**self.arguments, "progress": progress}
        if self.takes_layer:
            arguments["layer"] = layer
        drawn: dict[str, Any] = {}
        match self.input:
            case "pairs":
                first = [IOIDataset.generate(model.tokenizer, pairs, seed=seed, templates=self.templates)]
                drawn = {"pairs": pairs, "templates": self.templates}
            case "balanced":
                first = [balanced_pairs(model.tokenizer, pairs, seed=seed)]
                drawn = {"pairs": pairs, "templates": self.templates}
            case "prompts":
                first = [example_prompts(model.tokenizer, seed=seed)]
                arguments["seed"] = seed
            case "names":
                first = []
                arguments |= {"n_pairs": pairs, "seed": seed}
        result = self.function(model, *first, **arguments)
        return Result(result.table, result.meta | {"seed": seed} | drawn)


EXPERIMENTS: dict[str, Experiment] = {
    "resample_ablation": Experiment(resample_ablation, "fig4", "pairs"),
    "layer_removal": Experiment(layer_removal, "fig5", "pairs", 40, templates="all", needs_mamba=False),
    "greedy_layer_removal": Experiment(
        greedy_layer_removal, "fig5_greedy", "pairs", 40, templates="all", needs_mamba=False
    ),
    "cross_talk": Experiment(cross_talk, "fig6", "balanced", 200, templates="all"),
    "state_similarity": Experiment(state_similarity, "fig7", "prompts", takes_layer=True),
    "conv_slices": Experiment(conv_slices, "fig8", "pairs", takes_layer=True),
    "name_steering": Experiment(name_steering, "fig9", "names", multiple=125, templates="all", takes_layer=True),
    "name_pca": Experiment(name_pca, "fig9_pca", "names", multiple=125, templates="all", takes_layer=True),
    "resample_ablation_h": Experiment(resample_ablation, "fig10", "pairs", arguments={"site": "h"}),
    "resample_ablation_out_proj": Experiment(resample_ablation, "fig11", "pairs", arguments={"site": "out_proj"}),
}
"""Every experiment by name, in the order of the paper's figures."""
