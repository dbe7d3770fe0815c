"""The recall study: how models of several architectures find the value that stands beside a key (arXiv 2505.15105).

Every function here takes the subjects, models by name that share a tokenizer's words, and draws its own prompts
``BOS k1 v1 … kn vn EOS kq``. A change puts another key, or another value, in the place of the one that the query is
about. What is measured is the probability of the right answer, over the whole vocabulary: interchange runs the changed
prompt with one activation of the original put back, and says how far the probability is restored, 1 for all the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import whole_number
from ..interventions.attribution import attributed_effects
from ..interventions.cut import Cut
from ..interventions.patch import Resample
from ..interventions.readout import Readout
from ..interventions.run import run
from ..interventions.token_to_token import Part, hidden_attention
from ..metrics import logit_diff, vocabulary_probability
from ..models.model import CausalLM
from ..result import Result, bootstrap_interval
from ..tasks import PromptPairs, generate
from ..tasks.recall import CHANGES
from .common import mean_with_interval, measured_runs

Subjects = Mapping[str, CausalLM]

PAIRS = 6
"""How many pairs a prompt has, where that is not what is varied: as many as the packaged subjects are trained on."""
MOST_PAIRS = 8
PLACES = ("key", "value", "value+1", "value+2", "divider", "query")
"""Where activations are put back: the paper's four places, and the two tokens after the pair, which a conv of four taps
reaches from the key. Where these are the divider or the query, they count as such alone."""
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "block in": ("resid_pre",),
    "conv": ("conv",),
    "scan": ("y",),
    "mixer out": ("out_proj", "attn_out"),
    "block out": ("resid_post",),
}
"""The components by name, as they are computed, each with its site: the first of these that a layer has."""
SOURCES = ("key", "value", "value+1", "value+2")
"""From where the edges go that are looked at."""
TARGETS = (*SOURCES, "query")
LEAST_GAP = 0.05
"""How much less probable the right answer must be in the changed prompt, so that a share of it can be restored."""


def recall_accuracy(subjects: Subjects, *, pairs: int = 200, seed: int = 27, progress: bool = True) -> Result:
    """How often each subject is right, by the number of key-value pairs in the prompt.

    Args:
        subjects: models by name.
        pairs: how many prompts for each number of key-value pairs.
        seed: of the prompts.
        progress: without meaning here.

    Returns:
        A row for each subject and number of pairs: ``subject``, ``pairs``, ``accuracy`` (the answer is the most
        probable token of the vocabulary), ``low`` and ``high`` (its bootstrap 95 % interval), ``n`` (prompts).

    Raises:
        ValueError: if there is no subject, or one has no tokenizer or one without the words.
    """
    table = []
    for name, model in _checked(subjects).items():
        for count in range(1, MOST_PAIRS + 1):
            data = _drawn(model, pairs, seed, pairs=count)
            table.append({"subject": name, "pairs": count} | _rate(_right(model, data), "accuracy"))
    return _result("recall_accuracy", table, subjects, seed, rows=pairs)


def recall_distance(subjects: Subjects, *, pairs: int = 200, seed: int = 27, progress: bool = True) -> Result:
    """How often each subject is right, by how many tokens before the query the key stood, in prompts of 6 pairs.

    Arguments and errors as of `recall_accuracy`.

    Returns:
        A row for each subject and distance: ``subject``, ``distance`` (tokens from the key to the query),
        ``accuracy``, ``low``, ``high``, ``n``.
    """
    table = []
    for name, model in _checked(subjects).items():
        data = _drawn(model, pairs, seed, pairs=PAIRS)
        right, distance = _right(model, data), data.last_position - data.marks["key"]
        for one in distance.unique().tolist():
            table.append({"subject": name, "distance": one} | _rate(right[distance == one], "accuracy"))
    return _result("recall_distance", table, subjects, seed, rows=pairs)


def recall_interchange(subjects: Subjects, *, pairs: int = 200, seed: int = 27, progress: bool = True) -> Result:
    """Run the changed prompt with one activation of the original put back, and see how far the answer comes back.

    Arguments and errors as of `recall_accuracy`; ``pairs`` prompts for each kind of change.

    Returns:
        A row for each subject, change (``key`` or ``value``), layer, component that the layer has (`COMPONENTS`) and
        place (`PLACES`): ``subject, change, layer, component, place``, ``restored`` (the mean restored probability as
        a share of what the change takes; NaN where it takes less than 0.05), ``low`` and ``high`` (its bootstrap 95 %
        interval, with that share's whole held), ``original`` and ``changed`` (the answer's mean probability in the
        two prompts), ``n`` (rows that have the place).
    """
    table = []
    for name, model, change, data in _changed(subjects, pairs, seed):
        cells = [
            (layer, component, site, place)
            for layer in range(model.n_layers)
            for component, site in _components(model, layer).items()
            for place in PLACES
        ]
        changes = [[Resample(site, layer, data.marks[place][:, None])] for layer, _, site, place in cells]
        found = Found(model, data.changed, changes, f"{name}, changed {change}" if progress else None)
        for index, (layer, component, _, place) in enumerate(cells):
            head = {"subject": name, "change": change, "layer": layer, "component": component, "place": place}
            there = data.marks[place] >= 0
            table.append(head | found.share(index, there) | found.means() | {"n": int(there.sum())})
    return _result("recall_interchange", table, subjects, seed, rows=pairs)


def recall_edges(subjects: Subjects, *, pairs: int = 200, seed: int = 27, progress: bool = True) -> Result:
    """What single edges between tokens carry, inside the conv (one tap at one place) and inside the scan (a cut).

    Each edge is looked at from two sides: put into the original prompt as it is in the changed one (what is lost), and
    put into the changed prompt as it is in the original (what is restored). Arguments and errors as of
    `recall_accuracy`. Subjects without scans are left out (``meta["left_out"]``).

    Returns:
        A row for each subject, change, layer and edge: ``subject, change, layer``, ``via`` (``conv[-2]`` for a tap, or
        ``scan``), ``source``, ``target`` (places), ``lost`` with ``lost_low`` and ``lost_high``, ``restored`` with
        ``low`` and ``high``, both as shares of what the change takes, as in `recall_interchange`; ``n``.
    """
    table, with_scans = [], {name: model for name, model in _checked(subjects).items() if model.has_scans}
    for name, model, change, data in _changed(with_scans, pairs, seed):
        cells = [(layer, *edge) for layer in range(model.n_layers) for edge in _edges(model)]
        at = [
            (layer, *(data.marks[place][:, None] for place in (source, target)), tap)
            for layer, source, target, tap in cells
        ]
        both = [(s >= 0) & (t >= 0) for _, s, t, _ in at]
        changes: list[list[Any]] = [
            [Resample("conv_slice", layer, t.where(there, -1), tap)]
            if tap is not None
            else [Cut(layer, s.where(there, -1), t.where(there, -1), resample=True)]
            for (layer, s, t, tap), there in zip(at, both, strict=True)
        ]
        label = f"edges of {name}, changed {change}" if progress else None
        lost, restored = (Found(model, one, changes, label) for one in (data.original, data.changed))
        for index, (layer, source, target, tap) in enumerate(cells):
            there = both[index][:, 0]
            via = "scan" if tap is None else f"conv[{tap}]"
            head = {"subject": name, "change": change, "layer": layer, "via": via, "source": source, "target": target}
            gone = {("lost" if key == "restored" else f"lost_{key}"): v for key, v in lost.share(index, there).items()}
            table.append(head | gone | restored.share(index, there) | {"n": int(there.sum())})
    left = [name for name in subjects if name not in with_scans]
    return _result("recall_edges", table, subjects, seed, rows=pairs, left_out=left)


def recall_attention(subjects: Subjects, *, pairs: int = 200, seed: int = 27, progress: bool = True) -> Result:
    """What the query looks at in each layer: the scan's hidden attention (arXiv 2403.01590), or attention itself.

    Of a scan, the share of each source in ``|alpha[query, s]|``, the mean over channels or heads; of attention, its
    weight, the mean over heads. Arguments and errors as of `recall_accuracy`.

    Returns:
        A row for each subject, layer and source: ``subject, layer``, ``source`` (a place of `PLACES`, ``bos``, or
        ``other``: the pairs that are not asked for), ``share``, ``low``, ``high``, ``n`` (rows that have the place).
    """
    table = []
    for name, model in _checked(subjects).items():
        data = _drawn(model, pairs, seed, pairs=PAIRS)
        marks = _places(data)
        for layer in range(model.n_layers):
            share = _looked_at(model, data, layer)
            rest = 1 - share[:, 0]
            for place in PLACES:
                there = marks[place] >= 0
                value = share.gather(1, marks[place].clamp(min=0)[:, None])[:, 0]
                rest = rest - value.where(there, 0)
                table.append({"subject": name, "layer": layer, "source": place} | _rate(value[there], "share"))
            for place, value in (("bos", share[:, 0]), ("other", rest)):
                table.append({"subject": name, "layer": layer, "source": place} | _rate(value, "share"))
    return _result("recall_attention", table, subjects, seed, rows=pairs)


def recall_attribution(subjects: Subjects, *, pairs: int = 200, seed: int = 27, progress: bool = True) -> Result:
    """Interchange as attribution estimates it (arXiv 2310.10348): from one forward and backward of the changed prompts.

    What is estimated is the restored logit difference (right answer less corrupt answer), as a share of what the change
    takes. Arguments and errors as of `recall_accuracy`.

    Returns:
        A row for each cell of `recall_interchange`: ``subject, change, layer, component, place``, ``estimate``,
        ``low``, ``high``, ``n``.
    """
    table = []
    for name, model, change, data in _changed(subjects, pairs, seed):
        pair = data.changed
        ends = [run(model, tokens) for tokens in (pair.corrupt_tokens, pair.clean_tokens)]
        original, changed = (logit_diff(logits, pair.answers, pair.corrupt_answers) for logits in ends)
        whole = float((original - changed).mean())
        for component, site in _components(model, 0).items():
            layers = list(range(model.n_layers))
            effects = -attributed_effects(
                model,
                pair.clean_tokens,
                Readout.of(pair),
                site,
                layers,
                source=pair.corrupt_tokens,
                metric="logit_diff",
            )
            for layer, place in product(layers, PLACES):
                at = data.marks[place]
                value = effects[layer].T.gather(1, at.clamp(min=0)[:, None])[at >= 0, 0]
                value = value / whole if whole > LEAST_GAP else value * float("nan")
                head = {"subject": name, "change": change, "layer": layer, "component": component, "place": place}
                table.append(head | _rate(value, "estimate"))
    return _result("recall_attribution", table, subjects, seed, rows=pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


class Both:
    """Pairs of an original and a changed prompt, with the places in them.

    Attributes:
        original: runs the original prompt; the changed one is the source.
        changed: runs the changed prompt; the original one is the source. The answers are the original's.
        marks: each row's position of each place, -1 for none.
    """

    def __init__(self, data: PromptPairs) -> None:
        self.original = data
        self.changed = replace(data, clean_tokens=data.corrupt_tokens, corrupt_tokens=data.clean_tokens)
        self.marks = _places(data)


def _changed(subjects: Subjects, rows: int, seed: int) -> Iterator[tuple[str, CausalLM, str, Both]]:
    """Each subject with its prompts of each kind of change."""
    for name, model in _checked(subjects).items():
        for change in sorted(CHANGES):
            yield name, model, change, Both(_drawn(model, rows, seed, pairs=PAIRS, change=change))


def _drawn(model: CausalLM, rows: int, seed: int, **options: Any) -> PromptPairs:
    return generate("recall", model.tokenizer, whole_number(rows, "pairs", least=1), seed=seed, **options)  # pyright: ignore[reportArgumentType]


def _places(data: PromptPairs) -> dict[str, Int[Tensor, "B"]]:
    """Each row's position of each of `PLACES`; the tokens after the pair only where they are before the divider."""
    found = {"key": data.marks["key"], "value": data.marks["value"]}
    for back in (1, 2):
        after = data.marks["value"] + back
        found[f"value+{back}"] = after.where(after < data.marks["divider"], -1)
    return found | {"divider": data.marks["divider"], "query": data.last_position}


def _checked(subjects: Subjects) -> Subjects:
    if not isinstance(subjects, Mapping) or not subjects:
        raise ValueError(f"subjects are models by name, one at least, not {subjects!r:.80}")
    for name, model in subjects.items():
        if not isinstance(model, CausalLM) or model.tokenizer is None:
            raise ValueError(f"the subject {name!r} is a model from load_model with a tokenizer, not {model!r:.80}")
    return subjects


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


class Found:
    """The answer's probability in runs with changes, against that in the prompt itself and in its counterpart.

    Args:
        model: the model.
        data: pairs whose clean prompts are run, with values of their corrupt ones put in.
        changes: what is put in, run by run.
        description: of a progress bar.
    """

    def __init__(
        self, model: CausalLM, data: PromptPairs, changes: Sequence[Sequence[Any]], description: str | None
    ) -> None:
        everything = [Resample("resid_pre", 0)]  # the other prompt's own run
        moved, _ = measured_runs(model, data, [everything, *changes], metric=_probability, description=description)  # pyright: ignore[reportArgumentType]
        self.whole, self.moved = -moved[0], -moved[1:]
        self.start = _probability(run(model, data.clean_tokens), data)  # pyright: ignore[reportArgumentType]

    def share(self, index: int, there: Tensor) -> dict[str, float]:
        """How far a run is on the way from the prompt's probability to its counterpart's, with an interval."""
        value, whole = self.moved[index][there].double(), float(self.whole[there].double().mean())
        if not there.any() or abs(whole) < LEAST_GAP:
            return dict.fromkeys(("restored", "low", "high"), float("nan"))
        low, high = bootstrap_interval((value / whole).cpu().numpy())
        return {"restored": float(value.mean() / whole), "low": float(low), "high": float(high)}

    def means(self) -> dict[str, float]:
        """The answer's mean probability in the original and in the changed prompt, where the changed one is run."""
        start = self.start.double()
        return {"original": float((start + self.whole.double().to(start)).mean()), "changed": float(start.mean())}


def _probability(logits: Float[Tensor, "B V"], pairs: PromptPairs) -> Float[Tensor, "B"]:
    return vocabulary_probability(logits, pairs.answers)


def _right(model: CausalLM, data: PromptPairs) -> Tensor:
    """Whether the most probable token is the answer, row by row."""
    return (run(model, data.clean_tokens).argmax(1).cpu() == data.answers).double()  # pyright: ignore[reportArgumentType]


def _components(model: CausalLM, layer: int) -> dict[str, str]:
    """The sites of a layer's components."""
    there = model.sites_of(layer)
    found = {name: next((site for site in sites if site in there), None) for name, sites in COMPONENTS.items()}
    return {name: site for name, site in found.items() if site is not None}


def _edges(model: CausalLM) -> list[tuple[str, str, int | None]]:
    """Edges (source, target, tap): those that a tap of the conv makes, and those of the scan (tap None)."""
    taps = [
        (source, target, i - j)
        for (i, source), (j, target) in product(enumerate(SOURCES), repeat=2)
        if 0 <= j - i < model.d_conv  # pyright: ignore[reportAttributeAccessIssue]
    ]
    scan = [(source, target, None) for i, source in enumerate(SOURCES) for target in TARGETS[i:]]
    return [*taps, *scan]


def _looked_at(model: CausalLM, data: PromptPairs, layer: int) -> Float[Tensor, "B L"]:
    """The share of each position in what the query reads, row by row."""
    part: Part = "scan" if model.has_scans else "attention"
    last = data.last_position[:, None]
    alpha = hidden_attention(model, data.clean_tokens, layer, reduce=None, targets=last, part=part)  # pyright: ignore[reportArgumentType]
    weights = alpha.abs().mean(1)[:, 0]
    return (weights / weights.sum(1, keepdim=True)).cpu()


def _rate(values: Tensor, name: str) -> dict[str, float | int]:
    """The mean of a column over rows, with its interval, and how many rows there are."""
    if not len(values) or values.isnan().any():
        return {name: float("nan"), "low": float("nan"), "high": float("nan"), "n": len(values)}
    mean, low, high = mean_with_interval(values)
    return {name: float(mean), "low": float(low), "high": float(high), "n": len(values)}


def _result(name: str, table: list[dict[str, Any]], subjects: Subjects, seed: int, **arguments: Any) -> Result:
    left = {"left_out": arguments.pop("left_out")} if "left_out" in arguments else {}
    models = {subject: model.model_id for subject, model in subjects.items()}
    first = next(iter(subjects.values()))
    result = Result.create(
        name, pd.DataFrame(table), model=first, arguments=arguments, seed=seed, subjects=models, **left
    )
    return Result(result.table, result.meta | {"model": ", ".join(models.values()), "n_layers": None})
