"""How well some features of a dictionary do the task alone: the others resampled or zero, random ones beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..checks import integers, whole_number
from ..interventions.patch import Patch, SiteRef
from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import PromptPairs
from .common import check_data, mean_with_interval, measured_runs
from .feature_effects import ERROR, Encoded, both_runs, check_dictionary, feature_effects, parts_of


def feature_faithfulness(
    model: CausalLM,
    pairs: PromptPairs,
    sae: Any,
    site: str,
    layer: int,
    *,
    ks: Sequence[int] | None = None,
    effects: Result | None = None,
    rest: Literal["resample", "zero"] = "resample",
    keep_error: bool = False,
    draws: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """How well the k features that matter most do the task alone, beside as many others.

    The k features keep the clean run's values at all positions. All others, and what the dictionary leaves unexplained,
    take the corrupt run's values, or become 0. Random features are drawn among those that are active in some prompt.

    Args:
        model: any causal language model.
        pairs: pairs of prompts to judge on.
        sae: anything with ``encode`` and ``decode``; see `Splice`. It stays here where the model is on a server.
        site: a site of a layer that has positions.
        layer: the layer.
        ks: how many features are kept; 0, the powers of 2 and all that are active if None.
        effects: a result of `feature_effects`, whose order says which matter most: found on other pairs, so that the
            features are judged on held-out ones. If None, it is found on these pairs.
        rest: what becomes of the others: ``"resample"`` or ``"zero"``.
        keep_error: leave what the dictionary does not explain as it is in the clean run.
        draws: how many times k random features are drawn.
        seed: of these.
        progress: show a bar.

    Returns:
        A row for each k and choice: ``k``, ``kept`` (``top`` or ``random``), ``accuracy`` and ``nld`` (means over rows,
        NLD signed: 1 acts as clean, 0 as corrupted; of random features over draws too), ``accuracy_low``,
        ``accuracy_high``, ``nld_low`` and ``nld_high`` (bootstrap 95 % intervals over rows; of random features, the
        lowest and the highest draw), ``n`` (rows). ``meta["active"]``: how many features are active.

    Raises:
        ValueError: as `feature_effects`; for ``effects`` of another dictionary's features, or a k that is more than the
            features that there are.
    """
    check_data(model, pairs)
    ref = check_dictionary(model, sae, site, layer)
    draws, seed = whole_number(draws, "draws", least=1), whole_number(seed, "seed", least=0)
    if rest not in ("resample", "zero"):
        raise ValueError(f"the rest is to 'resample' or to 'zero', not {rest!r}")
    if effects is None:
        effects = feature_effects(model, pairs, sae, site, layer, top=0, progress=False)
    elif effects.meta.get("experiment") != "feature_effects":
        raise ValueError("effects are a result of feature_effects")
    active = _active(model, pairs, sae, ref)
    ranked = [int(one) for one in effects.table["feature"] if one != ERROR]
    if sorted(ranked) != list(range(len(active))):
        raise ValueError(f"effects are of {len(ranked)} features, and the dictionary has {len(active)}")
    pool = active.nonzero().flatten()
    if ks is None:
        ks = [0, *(2**power for power in range(len(pool)) if 2**power < len(pool)), len(pool)]
    sizes = integers(ks, "number of features")
    if not sizes or not all(0 <= one <= len(ranked) for one in sizes) or len(set(sizes)) < len(sizes):
        raise ValueError(f"ks are numbers of features from 0 to {len(ranked)}, each once, not {sizes}")
    draw = torch.Generator().manual_seed(seed)
    kept: list[tuple[int, str, Tensor]] = []
    for k in sizes:
        kept.append((k, "top", torch.tensor(ranked[:k], dtype=torch.long)))
        kept += [(k, "random", pool[torch.randperm(len(pool), generator=draw)[:k]]) for _ in range(draws)]
    lost, right = [], []
    bar = "feature_faithfulness" if progress else None
    for part in parts_of(model, pairs, ref, len(kept)):
        values = _kept(model, part, sae, ref, [features for _, _, features in kept], rest, keep_error)
        patches = [[Patch(ref.site.name, ref.layer, value)] for value in values]
        one, other = measured_runs(model, part, patches, metric="nld", description=bar)
        lost.append(one)
        right.append(other)
    table = _table([(k, name) for k, name, _ in kept], torch.cat(right, dim=1), 1 - torch.cat(lost, dim=1))
    table["n"] = len(pairs)
    arguments = {"site": ref.site.name, "layer": ref.layer, "rest": rest, "keep_error": keep_error, "draws": draws}
    arguments |= {"rows": len(pairs), "sae": type(sae).__name__, "features": len(ranked)}
    return Result.create("feature_faithfulness", table, model=model, arguments=arguments, seed=seed, active=len(pool))


def _active(model: CausalLM, pairs: PromptPairs, sae: Any, ref: SiteRef) -> Bool[Tensor, "F"]:
    """Which features are not 0 somewhere in the clean or the corrupt prompts."""
    found: list[Tensor] = []
    for part in parts_of(model, pairs, ref, 1):
        last = part.last_position.cpu()[:, None]
        for value in both_runs(model, part, ref):
            features = Encoded.of(sae, value).features.cpu()
            before = torch.arange(features.shape[1]) <= last
            found.append((features[before] != 0).flatten(0, -2).any(0))
    return torch.stack(found).any(0)


def _kept(
    model: CausalLM,
    pairs: PromptPairs,
    sae: Any,
    ref: SiteRef,
    chosen: Sequence[Tensor],
    rest: str,
    keep_error: bool,
) -> Iterator[Tensor]:
    """The site's value once all but some features, and the error, are the corrupt run's or 0."""
    values = both_runs(model, pairs, ref)
    here, there = (Encoded.of(sae, value) for value in values)
    for features in chosen:
        new = there.features.clone() if rest == "resample" else torch.zeros_like(here.features)
        new[..., features] = here.features[..., features]
        with torch.no_grad():
            made = sae.decode(new)
        if keep_error:
            made = made + here.error
        elif rest == "resample":
            made = made + there.error
        yield made.to(values[0])


def _table(kinds: Sequence[tuple[int, str]], right: Float[Tensor, "I B"], nld: Float[Tensor, "I B"]) -> pd.DataFrame:
    """A row for each kind: the mean, and an interval over rows, or over draws where there are several."""
    rows = []
    for kind in dict.fromkeys(kinds):
        same = [index for index, one in enumerate(kinds) if one == kind]
        row: dict[str, Any] = dict(zip(("k", "kept"), kind, strict=True))
        for name, values in (("accuracy", right[same]), ("nld", nld[same])):
            mean, low, high = mean_with_interval(values.mean(0)) if kind[1] == "top" else _of_draws(values)
            row |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _of_draws(values: Float[Tensor, "draws B"]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over all, and the lowest and the highest mean of a draw."""
    means = values.double().mean(1)
    return means.mean(), means.min(), means.max()
