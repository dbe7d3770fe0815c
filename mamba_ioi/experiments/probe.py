"""Linear probes: what a mark's token, or its slot, can be read from, at every position."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import whole_number
from ..interventions.patch import resolve
from ..interventions.stream import activations
from ..memory import fitting_rows, site_bytes
from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import PromptPairs
from .bottleneck import bottleneck
from .common import (
    ANSWER,
    cell_columns,
    check_any_places,
    check_data,
    check_layer,
    check_layers,
    mean_with_interval,
    positions_at,
    present,
    tokens_at,
)


def probe(
    model: CausalLM,
    pairs: PromptPairs,
    site: str,
    layers: Sequence[int] | int | None = None,
    target: str = ANSWER,
    *,
    what: Literal["token", "slot"] = "token",
    positions: Sequence[int] | int | None = None,
    marks: Sequence[str] | str | None = None,
    folds: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """How well a linear probe reads a mark's token, or its slot, off a site of the clean prompts, layer by layer.

    The probe is scikit-learn's ridge classifier, on all of the site's dimensions at one place, each scaled to unit
    variance. It is judged by cross-validation on prompts that it has not seen; equal prompts are in one fold. Beside it
    stands a control: the same probe for the same labels, shuffled among the rows (Hewitt & Liang, arXiv 1909.03368).

    Args:
        model: any causal language model.
        pairs: pairs of prompts, of which the clean ones are read.
        site: a site of a layer that has positions.
        layers: which layers; all that have the site if None.
        target: the mark whose token is read; or ``answer``: the answer (one token a row).
        what: ``"token"``: which token stands at the mark. ``"slot"``: the first of the data's marks at which this token
            stands, such as ``n2``.
        positions: where to read; every position of data whose rows are aligned if None.
        marks: read at these places instead, each row's own; of other data all of their marks and ``last`` if None.
        folds: how many parts the rows are cut into, each of which is tested once.
        seed: of the folds and of the shuffling.
        progress: show a bar.

    Returns:
        A row for each layer and place: ``layer``, ``position`` and ``label``, or ``mark``; ``accuracy`` (the share of
        rows that are read right), ``low`` and ``high`` (its bootstrap 95 % interval), ``control`` (the accuracy for
        shuffled labels), ``classes`` (how many labels there are), ``n`` (rows that have the place and the target).

    Raises:
        ValueError: without scikit-learn; for an unknown site, layer, mark or place; where the target is the same in all
            rows, or there are fewer different pairs than folds.
    """
    fit = _classifier()
    check_data(model, pairs)
    folds, seed = whole_number(folds, "folds", least=2), whole_number(seed, "seed", least=0)
    has = [layer for layer in range(model.n_layers) if site in model.layer_sites(layer)]
    chosen = check_layers(model, layers if layers is not None or not has else has)
    refs = [resolve(model, site, layer) for layer in chosen]
    if refs[0].position is not None or not refs[0].site.by_position:
        raise ValueError(f"probes read all positions of a layer's site, and {site!r} is none that has them")
    labels = torch.as_tensor(_labels(pairs, target, what))
    places = check_any_places(pairs, positions, marks)
    known = labels >= 0
    found: list[dict[str, Any]] = []
    kin = _kin(pairs)
    held = fitting_rows(model, len(pairs) * site_bytes(model, refs[0].site, 1), len(places), share=0.5)
    with tqdm(total=len(chosen) * len(places), desc="probe", unit="probe", disable=not progress) as bar:
        for layer in chosen:
            for start in range(0, len(places), held):
                some = places[start : start + held]
                values = _values(model, pairs, site, layer, some)
                for column, place in enumerate(some):
                    there = present(pairs, place) & known
                    found.append(_judged(fit, values[there, column], labels[there], kin[there], folds, seed, place))
                    bar.update()
    table = pd.DataFrame(cell_columns(pairs, chosen, places)).join(pd.DataFrame(found))
    arguments = {"site": site, "layers": chosen, "target": target, "what": what, "folds": folds, "rows": len(pairs)}
    arguments |= {"marks": places if "mark" in table else None}
    return Result.create("probe", table, model=model, arguments=arguments, seed=seed)


def probes(
    model: CausalLM,
    pairs: PromptPairs,
    layer: int | None = None,
    *,
    sites: Sequence[str],
    targets: Sequence[str],
    marks: Sequence[str],
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """`probe` for the tokens of several marks, each read off several sites of one layer.

    Which names the bottleneck keeps where is the question that the paper leaves open (Section 6): a probe that found
    the three names of a prompt, but not which stands where, would be right in one of three.

    Args:
        model: a Mamba, or any causal language model where the layer is named.
        pairs: pairs of prompts, of which the clean ones are read.
        layer: the layer; the bottleneck on these pairs if None.
        sites: the sites.
        targets: the marks whose tokens are read.
        marks: where to read.
        seed: of the folds and of the shuffling.
        progress: show bars.

    Returns:
        The rows of `probe` for each site and target, after the columns ``site`` and ``target``.

    Raises:
        ValueError: as `probe`.
    """
    check_data(model, pairs)
    layer = bottleneck(model, pairs, progress=progress) if layer is None else check_layer(model, layer)
    found = []
    for site, target in product(sites, targets):
        table = probe(model, pairs, site, layer, target, marks=marks, seed=seed, progress=progress).table
        table.insert(0, "site", site)
        table.insert(1, "target", target)
        found.append(table)
    arguments = {"layer": layer, "sites": [*sites], "targets": [*targets], "marks": [*marks], "rows": len(pairs)}
    return Result.create("probes", pd.concat(found, ignore_index=True), model=model, arguments=arguments, seed=seed)


def _classifier() -> Callable[[np.ndarray, np.ndarray, np.ndarray, int, int], np.ndarray]:
    """What predicts each row's label from probes that were fitted without it.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import RidgeClassifier  # pyright: ignore[reportMissingImports]
        from sklearn.model_selection import (  # pyright: ignore[reportMissingImports]
            PredefinedSplit,
            StratifiedGroupKFold,
            cross_val_predict,
        )
        from sklearn.pipeline import make_pipeline  # pyright: ignore[reportMissingImports]
        from sklearn.preprocessing import StandardScaler  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("probes need scikit-learn: pip install 'mamba-ioi[probe]'") from None

    def predicted(x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
        split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        if np.unique(y, return_counts=True)[1].max() < folds:  # no label is in every fold, whatever the cut
            kin, place = np.unique(groups, return_inverse=True)
            split = PredefinedSplit((np.random.default_rng(seed).permutation(len(kin)) % folds)[place])
        with warnings.catch_warnings():  # that a label has fewer rows than there are folds
            warnings.simplefilter("ignore", UserWarning)
            probe = make_pipeline(StandardScaler(), RidgeClassifier())
            return np.asarray(cross_val_predict(probe, x, y, groups=groups, cv=split))

    return predicted


def _labels(pairs: PromptPairs, target: str, what: str) -> Int[Tensor, "B"]:
    """Each row's label, -1 where it has none.

    Raises:
        ValueError: for an unknown target or kind of label, or labels that are all the same.
    """
    if what not in ("token", "slot"):
        raise ValueError(f"what is 'token' or 'slot', not {what!r}")
    labels = wanted = tokens_at(pairs, target)
    if what == "slot":
        labels = torch.full_like(wanted, -1)
        for slot, mark in reversed(list(enumerate(pairs.marks))):
            labels[(tokens_at(pairs, mark) == wanted) & (wanted >= 0)] = slot
    if len(labels[labels >= 0].unique()) < 2:
        raise ValueError(
            f"the {what} of {target!r} is not one of several in these rows: there is nothing to tell apart"
        )
    return labels


def _kin(pairs: PromptPairs) -> Int[Tensor, "B"]:
    """A number for each row, which rows have in common that share a prompt, be it by way of others."""
    _, prompts = torch.cat([pairs.clean_tokens, pairs.corrupt_tokens]).cpu().unique(dim=0, return_inverse=True)
    clean, corrupt = (half.tolist() for half in prompts.chunk(2))
    families = nx.connected_components(nx.Graph(zip(clean, corrupt, strict=True)))
    number = {prompt: index for index, family in enumerate(families) for prompt in family}
    return torch.tensor([number[prompt] for prompt in clean])


def _values(model: CausalLM, pairs: PromptPairs, site: str, layer: int, places: Sequence[int | str]) -> Tensor:
    """The site at some places, ``[B, places, features]``, on the CPU; of a row without one, what is at position 0."""
    at = positions_at(pairs, places).clamp(min=0)
    return torch.cat([part.flatten(2).cpu().float() for part in activations(model, pairs, site, layer, positions=at)])


def _judged(
    fit: Callable, values: Tensor, labels: Tensor, kin: Tensor, folds: int, seed: int, place: int | str
) -> dict[str, Any]:
    """What a table says of one probe.

    Raises:
        ValueError: if there are too few rows, or one label alone.
    """
    different, classes = len(kin.unique()), len(labels.unique())
    if different < folds or classes < 2:
        raise ValueError(
            f"at {place!r} there are {different} different pairs and {classes} labels: probes in {folds} folds need "
            f"{folds} pairs and 2 labels at least"
        )
    x, y, groups = values.numpy(), labels.numpy(), kin.numpy()
    shuffled = np.random.default_rng(seed).permutation(y)
    right, control = (fit(x, truth, groups, folds, seed) == truth for truth in (y, shuffled))
    accuracy, low, high = mean_with_interval(torch.as_tensor(right).float())
    ends = {"accuracy": float(accuracy), "low": float(low), "high": float(high)}
    return {**ends, "control": float(control.mean()), "classes": classes, "n": len(y)}
