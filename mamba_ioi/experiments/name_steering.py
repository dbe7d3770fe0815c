"""Figure 9: write a name's mean activation where another name was stored, and see whether the answer follows."""

from __future__ import annotations

import random

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import whole_number
from ..interventions.patch import Patch
from ..interventions.readout import Readout
from ..interventions.sweep import sweep
from ..metrics import logit_diff
from ..models.model import MambaModel
from ..result import Result
from ..tasks.ioi import IOIDataset
from .common import mean_with_interval
from .name_means import SLOTS, NameMeans, check_names, mean_prompts, name_means

METHODS = ("replace", "subtract_add")


def name_steering(
    model: MambaModel,
    layer: int | None = None,
    n_pairs: int = 10_000,
    n_test: int = 101,
    seed: int = 27,
    *,
    offset: int = 1,
    means: NameMeans | None = None,
    progress: bool = True,
) -> Result:
    """Write another name into a layer's SSM at one slot, and count how often the model's answer changes accordingly.

    At the target slot's position + ``offset``, ``replace`` puts the mean that the new name has in the source slot in
    place of ``ssm_input``; ``subtract_add`` adds that mean less the mean that the old name has in the source slot. The
    test prompts, ``n_test`` for each target slot, are drawn with replacement from those that the means are taken over,
    of each pair either prompt, as the authors do (paper, Section 4.3 and Figure 9):

    * slots 1 to 3: prompts whose answer stands in that slot. The pair's other answer is written over it, which may
      stand in the prompt already; success is its logit above the answer's.
    * slots 4 and 5: all prompts. The answer is written over the repeated name; success is that name's logit above the
      answer's, because now it is the one that is not repeated.

    Args:
        model: a Mamba with a tokenizer.
        layer: the layer; the model's bottleneck on a few pairs drawn with ``seed`` if None.
        n_pairs: pairs that the means are taken over.
        n_test: test prompts for each target slot.
        seed: of the pairs that the means are taken over, and of the draw of test prompts from them.
        offset: how far after its token a name reaches the SSM; see `name_means`.
        means: what `name_means` found, to save taking them again; then ``layer``, ``n_pairs``, ``seed`` and ``offset``
            are its own.
        progress: show a bar.

    Returns:
        A row for each ``method``, ``source_slot`` and ``target_slot``: ``success`` (share of prompts), ``low`` and
        ``high`` (its bootstrap 95 % interval), ``n`` (prompts). Prompts with a name that has no mean in the source
        slot are left out; where none is left, or none has its answer in the target slot, ``n`` is 0 and the rest is
        NaN.

    Raises:
        ValueError: as `name_means`; and if no test prompt has names with means.
    """
    means = means or name_means(model, layer, n_pairs, seed=seed, offset=offset, progress=progress)
    check_names(model, means.offset)
    n_test = whole_number(n_test, "n_test", least=1)
    rows = []
    pool = mean_prompts(model, means.n_pairs, means.seed)
    drawn = test_rows(pool, n_test, means.seed)
    for target in tqdm(SLOTS, desc="steering, by target slot", disable=not progress):
        data = pool[drawn[target]]
        outcomes = _steer(model, data, means, target)
        for method, source in ((method, source) for method in METHODS for source in SLOTS):
            success, usable = outcomes[method, source]
            cell = {"method": method, "source_slot": source, "target_slot": target}
            scores = dict.fromkeys(("success", "low", "high"), float("nan"))
            if usable.any():
                found = mean_with_interval(success[usable])
                scores = dict(zip(scores, map(float, found), strict=True))
            rows.append(cell | scores | {"n": int(usable.sum())})
    table = pd.DataFrame(rows).sort_values(["method", "source_slot", "target_slot"])
    if not table["n"].any():
        raise ValueError(
            f"no test prompt has names with means: {means.n_pairs} pairs are too few for {len(means.names)} names"
        )
    arguments = {
        "layer": means.layer,
        "n_pairs": means.n_pairs,
        "n_test": n_test,
        "offset": means.offset,
    }
    return Result.create("name_steering", table, model=model, arguments=arguments, seed=means.seed)


def test_rows(pool: IOIDataset, n_test: int, seed: int) -> dict[int, list[int]]:
    """By target slot, ``n_test`` rows of the prompts, drawn with replacement from those that it can be tested on.

    Every row for slots 4 and 5, those whose answer stands in the slot for the others; none where there are none.
    """
    rng = random.Random(seed)
    drawn = {}
    for target in SLOTS:
        fits = torch.ones(len(pool), dtype=torch.bool)
        if target <= 3:
            fits = pool.clean_names[:, target - 1] == pool.answers
        rows = fits.nonzero()[:, 0].tolist()
        drawn[target] = [rows[int(rng.random() * len(rows))] for _ in range(n_test if rows else 0)]
    return drawn


test_rows.__test__ = False  # its name is no reason for pytest to collect it


def _steer(
    model: MambaModel, data: IOIDataset, means: NameMeans, target: int
) -> dict[tuple[str, int], tuple[Float[Tensor, "B"], Bool[Tensor, "B"]]]:
    """By method and source slot: 1.0 where the name that should win has the higher logit, and which rows count."""
    old_tokens = data.clean_names[:, target - 1]
    new_tokens, winners = (data.corrupt_answers,) * 2 if target <= 3 else (data.answers, old_tokens)
    old, new = means.index(old_tokens), means.index(new_tokens)
    cases = [(method, source) for method in METHODS for source in SLOTS]
    at = (data.name_positions[:, target - 1] + means.offset)[:, None]
    interventions = []
    for method, source in cases:
        value, added = means.means[new, source - 1], method == "subtract_add"
        if added:
            value = value - means.means[old, source - 1]
        interventions.append([Patch("ssm_input", means.layer, value[:, None], at, add=added)])
    success = torch.zeros(len(cases), len(data))
    if len(data):
        readout = _duel(winners, data.answers, data.last_position)
        for case, run in enumerate(sweep(model, data.clean_tokens, interventions, readout)):
            success[case] = (logit_diff(run, readout.answers, readout.corrupt_answers) > 0).float()
    outcomes = {}
    for (method, source), wins in zip(cases, success, strict=True):
        usable = means.counts[new, source - 1] > 0
        if method == "subtract_add":
            usable = usable & (means.counts[old, source - 1] > 0)
        outcomes[method, source] = wins, usable
    return outcomes


def _duel(winners: Int[Tensor, "B"], losers: Int[Tensor, "B"], last: Int[Tensor, "B"]) -> Readout:
    """Read two names' logits: the name that should win is the answer."""
    first = torch.zeros_like(winners)
    return Readout(
        tokens=torch.stack([winners, losers], dim=1),
        last=last,
        answers=first,
        corrupt_answers=first + 1,
        candidates=torch.tensor([0, 1, -1, -1]).expand(len(winners), 4),
    )


def name_pca(
    model: MambaModel,
    layer: int | None = None,
    n_pairs: int = 10_000,
    *,
    seed: int = 27,
    offset: int = 1,
    means: NameMeans | None = None,
    progress: bool = True,
) -> Result:
    """The names' mean ``ssm_input`` in the plane of their first two principal components.

    Principal components of all means, one a name and slot, less their average; each component's sign is such that its
    largest weight is positive. The paper names this as future work.

    Args:
        model: a Mamba with a tokenizer.
        layer: the layer; the model's bottleneck on a few pairs drawn with ``seed`` if None.
        n_pairs: pairs that the means are taken over.
        seed: of those pairs.
        offset: how far after its token a name reaches the SSM; see `name_means`.
        means: what `name_means` found, to save taking them again; then the arguments above are its own.
        progress: show a bar.

    Returns:
        A row for each name and slot: ``pc1``, ``pc2``, ``n`` (values the mean is over).
        ``meta["explained_variance"]`` holds the two components' shares of the variance.

    Raises:
        ValueError: as `name_means`; and if there are fewer than three means.
    """
    means = means or name_means(model, layer, n_pairs, seed=seed, offset=offset, progress=progress)
    names, slots = (means.counts > 0).nonzero(as_tuple=True)
    if len(names) < 3:
        raise ValueError(f"principal components need at least three means, not {len(names)}")
    points = means.means[names, slots].double()
    _, lengths, components = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    components = components[:2]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    coordinates = (points - points.mean(0)) @ (components * largest.sign()).T
    variances = lengths.square()
    shares = (variances / variances.sum().clamp(min=1e-300))[:2]
    table = pd.DataFrame(
        {
            "name": [means.names[name] for name in names.tolist()],
            "slot": (slots + 1).tolist(),
            "pc1": coordinates[:, 0].tolist(),
            "pc2": coordinates[:, 1].tolist(),
            "n": means.counts[names, slots].tolist(),
        }
    )
    return Result.create(
        "name_pca",
        table,
        model=model,
        arguments={"layer": means.layer, "n_pairs": means.n_pairs, "offset": means.offset},
        seed=means.seed,
        explained_variance=shares.tolist(),
    )
