"""Which features of a dictionary at one site carry the answer, estimated for all of them and measured for some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import whole_number
from ..interventions.attribution import gradients_at
from ..interventions.patch import Patch, SiteRef, resolve
from ..interventions.readout import Readout
from ..interventions.run import cache
from ..interventions.splice import Splice, as_its_own
from ..interventions.sweep import sweep
from ..memory import fitting_rows, site_bytes
from ..metrics import logit_diff, normalized
from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, check_metric, metric_name
from .common import check_data, mean_with_interval, measured_runs

ERROR = -1
"""The feature that stands for what the dictionary does not explain."""


@dataclass(frozen=True)
class Encoded:
    """A site's value, as a dictionary's features and what it leaves unexplained."""

    features: Float[Tensor, "B L *inner F"]
    error: Float[Tensor, "B L *inner W"]

    @classmethod
    def of(cls, sae: Any, value: Float[Tensor, "B L *inner W"]) -> Encoded:
        """Both, in the dictionary's own precision."""
        with torch.no_grad():
            x = as_its_own(sae, value)
            features = sae.encode(x)
            return cls(features, x - sae.decode(features))

    def with_one(self, sae: Any, other: Encoded, name: int) -> Float[Tensor, "B L *inner W"]:
        """The value that they make once a feature, or the error, is another's."""
        features = self.features.clone()
        if name != ERROR:
            features[..., name] = other.features[..., name]
        with torch.no_grad():
            return sae.decode(features) + (other if name == ERROR else self).error


def feature_effects(
    model: CausalLM,
    pairs: PromptPairs,
    sae: Any,
    site: str,
    layer: int,
    *,
    top: int = 20,
    steps: int = 10,
    metric: Metric | None = None,
    progress: bool = True,
) -> Result:
    """What each feature of a dictionary does for the answer (Marks et al., arXiv 2403.19647).

    The effect of a feature is measured in the clean prompts: it takes its value of the corrupt prompts at all
    positions, all other features and the dictionary's error stay the clean run's. The estimate is by integrated
    gradients: along the straight path of all features and the error together from the clean run's values to the
    corrupt run's, the mean gradient times what each changes by. So estimates add up to the effect of the whole site,
    and agree with the measured ones where features do not act on one another. Where a router chooses other experts
    along the path, the jump is in no gradient, and estimates miss it.

    Args:
        model: any causal language model.
        pairs: pairs of prompts.
        sae: anything with ``encode`` and ``decode``; see `Splice`. It stays here where the model is on a server.
        site: a site of a layer that has positions.
        layer: the layer.
        top: how many features are measured: those whose estimates are largest, whatever their sign.
        steps: at how many points of the path gradients are taken, the middles of as many parts.
        metric: the metric's name; the pairs' own if None. Under ``nld`` effects are 1 - NLD; under another metric what
            it loses.
        progress: show a bar.

    Returns:
        A row for each feature, the largest estimates first: ``feature`` (-1: what the dictionary leaves unexplained,
        which is measured too), ``effect`` (the mean over rows, signed; NaN where it was not measured), ``low`` and
        ``high`` (its bootstrap 95 % interval), ``estimate`` (of it), ``n`` (rows).

    Raises:
        ValueError: for an unknown site or layer, a site without positions, a metric that is a callable, or on a server
            whose sandbox has no gradients.
    """
    check_data(model, pairs)
    top, steps = whole_number(top, "top", least=0), whole_number(steps, "steps", least=1)
    ref = check_dictionary(model, sae, site, layer)
    metric = check_metric(pairs, metric)
    if not isinstance(metric, str):
        raise ValueError(f"estimates are of metrics by name, and {metric!r} is a callable")
    estimates = torch.cat([_estimates(model, part, sae, ref, steps, metric) for part in parts_of(model, pairs, ref, 1)])
    means = estimates.double().mean(0)
    size = len(means) - 1
    ordered = means.abs().argsort(descending=True, stable=True)
    chosen = [int(one) for one in ordered if one < size][:top]
    names = [*chosen, ERROR]
    found = []
    for part in parts_of(model, pairs, ref, len(names)):
        patches = [[Patch(ref.site.name, ref.layer, value)] for value in _values(model, part, sae, ref, names)]
        bar = "feature_effects" if progress else None
        found.append(measured_runs(model, part, patches, metric=metric, description=bar)[0])
    table = pd.DataFrame({"feature": [ERROR if one == size else one for one in ordered.tolist()]})
    columns = ("effect", "low", "high")
    measured = pd.DataFrame(dict(zip(columns, mean_with_interval(torch.cat(found, dim=1)), strict=True)), index=names)
    for name in columns:
        table[name] = measured[name].reindex(table["feature"]).to_numpy()
    table["estimate"] = means[ordered].numpy()
    table["n"] = len(pairs)
    arguments = {"site": ref.site.name, "layer": ref.layer, "top": top, "steps": steps, "rows": len(pairs)}
    arguments |= {"metric": metric_name(metric), "sae": type(sae).__name__, "features": size}
    return Result.create("feature_effects", table, model=model, arguments=arguments)


def check_dictionary(model: CausalLM, sae: Any, site: str, layer: int | None) -> SiteRef:
    """The site whose values a dictionary encodes.

    Raises:
        ValueError: for what has no ``encode`` and ``decode``, an unknown site or layer, or a site without positions.
    """
    Splice(sae)  # has both
    ref = resolve(model, site, layer)
    if ref.position is not None or ref.layer is None or not ref.site.by_position:
        raise ValueError(f"features are looked at all positions of a layer's site, and {site!r} is none that has them")
    return ref


def parts_of(model: CausalLM, pairs: PromptPairs, ref: SiteRef, held: int) -> Iterator[PromptPairs]:
    """The pairs, some at a time: so many that the memory holds this many values of the site, beside a few."""
    row = (held + 8) * site_bytes(model, ref.site, pairs.clean_tokens.shape[1])
    rows = fitting_rows(model, row, len(pairs), share=0.5)
    for start in range(0, len(pairs), rows):
        yield pairs[start : start + rows]


def both_runs(model: CausalLM, pairs: PromptPairs, ref: SiteRef) -> tuple[Tensor, Tensor]:
    """The site's value in the clean and in the corrupt prompts."""
    clean, corrupt = (cache(model, ids, [ref.key])[ref.key] for ids in (pairs.clean_tokens, pairs.corrupt_tokens))
    return clean, corrupt


@torch.inference_mode(False)  # gradients are asked for here, whatever mode the caller is in
def _estimates(
    model: CausalLM, pairs: PromptPairs, sae: Any, ref: SiteRef, steps: int, metric: str
) -> Float[Tensor, "B G"]:
    """Each row's estimate for each feature, and last for the error."""
    values = both_runs(model, pairs, ref)
    here, there = (Encoded.of(sae, value.clone()) for value in values)
    ids = pairs.answers, pairs.corrupt_answers, pairs.candidates
    of_features, of_error = torch.zeros_like(here.features), torch.zeros_like(here.error)
    for step in range(steps):
        at = (step + 0.5) / steps
        features = torch.lerp(here.features, there.features, at).requires_grad_()
        with torch.enable_grad():
            made = sae.decode(features)
        value = (made.detach() + torch.lerp(here.error, there.error, at)).to(values[0])
        gradient = gradients_at(model, pairs.clean_tokens, ref, value, pairs.last_position, ids, metric).to(made)
        of_features += torch.autograd.grad(made, features, gradient)[0] / steps
        of_error += gradient / steps
    change = (of_features * (there.features - here.features)).flatten(1, -2).sum(1)
    error = (of_error * (there.error - here.error)).flatten(1).sum(1, keepdim=True)
    changes = torch.cat([change, error], 1).cpu()
    if metric != "nld":
        return -changes
    clean, corrupt = (_difference(model, pairs, ids) for ids in (pairs.clean_tokens, pairs.corrupt_tokens))
    return (1 - normalized(clean + changes.T, clean, corrupt, absolute=False)).T


def _difference(model: CausalLM, pairs: PromptPairs, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B"]:
    """Each prompt's logit difference."""
    readout = Readout.of(pairs)
    return logit_diff(sweep(model, tokens, [[]], readout)[0], readout.answers, readout.corrupt_answers).cpu()


def _values(model: CausalLM, pairs: PromptPairs, sae: Any, ref: SiteRef, names: list[int]) -> Iterator[Tensor]:
    """The site's value once one feature, or the error, is the corrupt run's."""
    values = both_runs(model, pairs, ref)
    here, there = (Encoded.of(sae, value) for value in values)
    for name in names:
        yield here.with_one(sae, there, name).to(values[0])
