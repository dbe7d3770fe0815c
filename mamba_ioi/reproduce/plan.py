"""What a run of `reproduce` will take, figure by figure: the catalogue's counts, times one forward that is measured.

The counts are those of the page "What each method costs", with what a patched run or a step backwards was measured to
take beside a forward: an estimate. Of the 26 figures of `tiny` it says 8 minutes, where they took 6; of single figures
of a few seconds, down to 0.4 of the time. On the shape of mamba-370m, with 2 pairs on 2 cores, Figures 4, 4 by marks
and 5 took 61, 49 and 22 s, where it says 75, 45 and 17.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ..catalogue import CATALOGUE, Row, choose
from .folder import PLAN
from .makers import Given, Settings, prepare, unavailable, unfit

if TYPE_CHECKING:
    from ..models.model import CausalLM
    from ..result import Result

LENGTH = 20
"""How many tokens a prompt of the paper has, about: what a forward is measured on."""
_ROWS, _REPEATS = 8, 3
_MOST_ROWS, _MOST_BACKWARDS = 256, 32
"""How many rows run at once, at most."""
LEAST_PAIRS = 2
"""A budget takes a figure away before it takes fewer pairs than these."""


@dataclass(frozen=True)
class Sizes:
    """What the counts of the catalogue depend on.

    Attributes:
        layers: of the model.
        taps: of its conv; 0 where it has none.
        length: positions of a prompt.
    """

    layers: int
    taps: int = 4
    length: int = LENGTH

    @property
    def edges(self) -> int:
        """Edges of the coarse graph without positions."""
        return (self.layers + 1) * (self.layers + 2) // 2


@dataclass(frozen=True)
class Work:
    """What a figure takes.

    Attributes:
        figure: its id, or ``bottleneck``, which is chosen first.
        rows: prompts, clean ones and no others.
        forwards: as many forwards of one prompt take as long, about.
        at_most: whether the number of rounds depends on the model, and this is the most.
        seconds: None where no forward was measured, as on a server.
        memory: bytes, the weights included; None likewise.
    """

    figure: str
    rows: int
    forwards: float
    at_most: bool
    seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Plan:
    """The works in order, where they will run, and what was taken away to keep to a budget.

    Attributes:
        works: of the figures that will be made.
        device: where.
        forward: seconds of a forward of one prompt among `_ROWS`; None where it was not measured.
        pairs: the number of pairs that was chosen; None: each figure's own.
        left_out: works that do not fit into the budget.
        budget: in seconds; None if there is none.
    """

    works: list[Work]
    device: str
    forward: float | None
    pairs: int | None = None
    left_out: tuple[Work, ...] = ()
    budget: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of all works together; None where no forward was measured."""
        return None if self.forward is None else sum(work.seconds or 0.0 for work in self.works)

    def result(self, model: CausalLM) -> Result:
        """The plan as a Result, a row a work: its fields, and whether it is ``kept``; `of` gives it back."""
        import pandas as pd

        from ..result import Result

        rows = [asdict(work) | {"kept": work in self.works} for work in (*self.works, *self.left_out)]
        arguments = {"budget": self.budget, "pairs": self.pairs, "forward": self.forward, "device": self.device}
        return Result.create(PLAN, pd.DataFrame(rows), model=model, arguments=arguments)

    @classmethod
    def of(cls, result: Result) -> Plan:
        """The plan that a Result holds."""
        fields = result.table.drop(columns="kept").to_dict("records")
        works = [Work(**fields) for fields in fields]
        kept = result.table.kept.tolist()
        arguments = result.meta["arguments"]
        return cls(
            [work for work, one in zip(works, kept, strict=True) if one],
            arguments["device"],
            arguments["forward"],
            arguments["pairs"],
            tuple(work for work, one in zip(works, kept, strict=True) if not one),
            arguments["budget"],
        )


def count(row: Row, sizes: Sizes, pairs: int) -> tuple[int, float]:
    """How many prompts a figure takes, and as many forwards of one prompt as take as long, about."""
    rows = pairs * row.multiple * {"pairs": 2, "balanced": 40, "names": 2}.get(row.input, 0)
    return rows, float(row.forwards(sizes, rows))


def plan_of(settings: Settings, only: str | None = None) -> Plan:
    """What `reproduce` would take, with nothing in its folder yet.

    Args:
        settings: what is asked for, with the budget if there is one.
        only: ids of figures with commas between; all that the model can have if None.

    Raises:
        ValueError: as `reproduce`, and if nothing fits into the budget.
    """
    figures = [figure for figure in choose(only) if settings.source is None or not CATALOGUE[figure].needs_names]
    return prepared_plan(settings, figures)[0]


def prepared_plan(settings: Settings, figures: Sequence[str]) -> tuple[Plan, CausalLM, Given | None]:
    """The plan of those of the figures that can be made, with the model that was loaded for it, and its pairs."""
    figures = [figure for figure in figures if unavailable(figure, settings) is None]
    model, given = prepare(settings, figures)
    figures = [figure for figure in figures if unfit(figure, model, given) is None]
    return planned(model, settings, figures, given), model, given


def planned(model: CausalLM, settings: Settings, figures: Sequence[str], given: Given | None) -> Plan:
    """What the figures take with the settings' pairs, by a forward that is measured now; or with what fits the budget.

    Raises:
        ValueError: if nothing fits into the budget.
    """
    if settings.budget is not None:
        return fitted(model, settings, figures, given, settings.budget)
    sizes, forward = _sizes(model, given), _forward_seconds(model, given)
    works = _works(model, figures, sizes, settings.pairs, given, forward)
    return Plan(works, str(model.device), forward, settings.pairs)


def fitted(model: CausalLM, settings: Settings, figures: Sequence[str], given: Given | None, seconds: float) -> Plan:
    """The most pairs with which the figures fit into a budget; at `LEAST_PAIRS`, without those that take most.

    Args:
        model: the model.
        settings: what is asked for; its ``pairs`` are the most.
        figures: their ids.
        given: pairs of another task, all of which are taken: figures alone can be left out.
        seconds: the budget.

    Raises:
        ValueError: if nothing fits, or the model runs on a server, whose time is not measured.
    """
    sizes, forward = _sizes(model, given), _forward_seconds(model, given)
    if forward is None:
        raise ValueError("a budget needs a forward that is measured here, and this model runs on a server")

    def plan(pairs: int | None) -> Plan:
        return Plan(
            _works(model, figures, sizes, pairs, given, forward), str(model.device), forward, pairs, (), seconds
        )

    own = plan(settings.pairs)
    if (own.seconds or 0.0) <= seconds:
        return own
    most = settings.pairs or max((CATALOGUE[figure].pairs or 1) for figure in figures)
    if given is None and (plan(LEAST_PAIRS).seconds or 0.0) <= seconds:
        low, high = LEAST_PAIRS, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if (plan(middle).seconds or 0.0) <= seconds else (low, middle - 1)
        return plan(low)
    least = plan(settings.pairs if given is not None else min(LEAST_PAIRS, most))
    kept, left_out = list(least.works), []
    while sum(work.seconds or 0.0 for work in kept) > seconds:
        figures_left = [work for work in kept if work.figure in CATALOGUE]
        if not figures_left:
            break
        largest = max(figures_left, key=lambda work: work.seconds or 0.0)
        kept.remove(largest)
        left_out.append(largest)
    if not any(work.figure in CATALOGUE for work in kept):
        raise ValueError(
            f"nothing fits into a budget of {duration(seconds)}: the least, {left_out[-1].figure}, takes about "
            f"{duration(left_out[-1].seconds or 0.0)}"
        )
    return replace(least, works=kept, left_out=tuple(left_out))


def _works(
    model: CausalLM,
    figures: Sequence[str],
    sizes: Sizes,
    pairs: int | None,
    given: Given | None,
    forward: float | None,
) -> list[Work]:
    from ..experiments.bottleneck import DEFAULT_PAIRS

    works = []
    if model.has_scans and any(CATALOGUE[figure].draws for figure in figures):
        rows = 2 * DEFAULT_PAIRS if given is None else len(given.data)
        works.append(_work(model, "bottleneck", rows, rows * sizes.layers * 0.27, False, sizes, forward))
    for figure in figures:
        row = CATALOGUE[figure]
        if given is not None:
            rows = len(given.data) if row.draws else 0
            forwards = float(row.forwards(sizes, rows))
        else:
            rows, forwards = count(row, sizes, (row.pairs or 1) if pairs is None else pairs)
        works.append(_work(model, figure, rows, forwards, row.at_most, sizes, forward))
    return works


def _work(
    model: CausalLM, figure: str, rows: int, forwards: float, at_most: bool, sizes: Sizes, forward: float | None
) -> Work:
    """With seconds and memory, where a forward was measured."""
    if forward is None:
        return Work(figure, rows, forwards, at_most)
    from ..memory import backward_bytes, budget, forward_bytes

    backwards = figure in CATALOGUE and CATALOGUE[figure].backwards
    row, most = (backward_bytes, _MOST_BACKWARDS) if backwards else (forward_bytes, _MOST_ROWS)
    weights = sum(one.nbytes for one in model._module.parameters())
    memory = weights + min(budget(model), int(min(forwards, most)) * row(model, sizes.length))
    return Work(figure, rows, forwards, at_most, forwards * forward, memory)


def _sizes(model: CausalLM, given: Given | None) -> Sizes:
    length = LENGTH if given is None else given.data.clean_tokens.shape[1]
    return Sizes(model.n_layers, int(model.d_conv) if model.has_scans else 0, length)


def _forward_seconds(model: CausalLM, given: Given | None) -> float | None:
    """Of one prompt among several, the smallest of a few; None of a model on a server."""
    if model.remote is not None:
        return None
    import torch

    from ..interventions.run import run

    if given is None:
        tokens = torch.arange(_ROWS * LENGTH).view(_ROWS, LENGTH) % model.vocab_size
    else:
        tokens = given.data.clean_tokens[:_ROWS]
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run(model, tokens)[0, 0].item()
        times.append(time.perf_counter() - start)
    return min(times) / len(tokens)


def said(plan: Plan) -> list[str]:
    """The plan, a line a figure and one for all."""
    lines = []
    for work in plan.works:
        lines.append(f"{work.figure:12} {_told(work)}")
    for work in plan.left_out:
        lines.append(f"{work.figure:12} left out, it does not fit: {_told(work)}")
    where = f"on {plan.device}"
    if plan.seconds is None or plan.forward is None:
        return [*lines, f"{'all':12} on a server, whose time is not known"]
    pairs = "" if plan.budget is None or plan.pairs is None else f", with {plan.pairs} pairs"
    within = "" if plan.budget is None else f" of a budget of {duration(plan.budget)}"
    lines.append(
        f"{'all':12} about {duration(plan.seconds)}{within}{pairs} {where}, where a forward of a prompt takes "
        f"{1000 * plan.forward:.3g} ms"
    )
    return lines


def _told(work: Work) -> str:
    if not work.forwards:
        return "no forward"
    most = "at most " if work.at_most else ""
    counted = f"{work.rows} prompts, {most}{_rounded(work.forwards)} forwards"
    if work.seconds is None or work.memory is None:
        return counted
    return f"{counted}, {most}about {duration(work.seconds)}, {work.memory / 2**30:.2g} GiB"


def _rounded(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2g}"


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``12 min``, ``3.5 h``, ``4 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
