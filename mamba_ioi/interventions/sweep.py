"""Many patched runs of the same prompts, each started where its first change is.

A change at layer l leaves the layers below as they were, and one at position p leaves the positions before it as
they were: a Mamba carries nothing from p - 1 to p but each layer's state h and the last inputs of its conv. So every
prompt runs once, unpatched; an intervention starts from that run's residual stream at (l, p) and from its states at
p - 1, and runs only the layers from l on and the positions from p on. A resampled value is the clean one where the
two prompts have not yet parted, so there is nothing to run. Interventions that start at the same position run
together: each joins the batch at its own layer. Every forward is one nnsight trace.

In a hybrid attention reads all positions before p: there runs start at layer l and the prompt's first position.

For a remote model the same code runs on the server: a request brings token ids and what to change, the base run's and
the source run's activations stay there, and the few logits of the readout come back.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..memory import budget, fitting_rows, forward_bytes, state_bytes, stream_bytes
from ..models.model import CausalLM
from ..remote.requests import ask
from ..trace.anatomy import given_embeddings
from ..trace.change import Change, Placed, SourceValues
from ..trace.cut import NAMES, carry, mask
from ..trace.recurrence import compute_dtype
from ..trace.state import LayerState
from ..trace.touched import refuse_touched
from .batches import Batch, Item, divergence_index, entries, first_changed, row_positions, run_batch, run_prefix
from .cut import Cut, check_cut, refuse_twice
from .patch import Patch, Resample, SiteRef, check_patch, resolve
from .plan import Plan, forward, source_values
from .positions import read_positions
from .readout import Readout, picked
from .run import cache, run, source_tokens

logger = logging.getLogger(__name__)

MOST_ROWS = 256
REQUEST_ROWS = 4096
"""How many patched rows one request to a server asks for: its time is bounded, and its base run shared by many."""


def sweep(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    interventions: Sequence[Sequence[Patch | Resample | Cut]],
    readout: Readout,
    *,
    source: Int[Tensor, "B L"] | None = None,
    description: str | None = None,
) -> Float[Tensor, "I B K"]:
    """The logits at the readout's tokens under each intervention, equal to a `run` of each one.

    Batches are as large as ``model.memory`` allows.

    Args:
        model: a Mamba.
        tokens: the prompts to run, ``[B, L]``.
        interventions: each one a set of changes made together, at sites inside the layers or ``embed``; ``[]`` is the
            plain run. A tensor's first dimension counts the rows of ``tokens`` (or is 1). An intervention with a
            callable is a run of the whole prompts, so that it sees every row as in `run`.
        readout: which logits to return.
        source: the prompts that `Resample` and a `Cut` with ``resample=True`` take values from, row for row with
            ``tokens``.
        description: the progress bar's title; no bar if None.

    Returns:
        Logits ``[len(interventions), B, K]`` on the CPU.

    Raises:
        ValueError: for a change at an unknown site, layer or position, with a value that does not fit, or at a site
            that has no positions; for a `Resample` without source tokens; for a readout of other prompts; for a model
            that carries edits or hooks.
    """
    tokens, _ = model.to_tokens(tokens)
    source = source_tokens(model, tokens, source)
    readout.check(tokens, model.vocab_size)
    alone = [not model.has_scans or any(_needs_a_run(model, one) for one in some) for some in interventions]
    if any(alone):
        found = torch.empty(len(alone), *readout.read.shape, dtype=compute_dtype(model.dtype))
        for whole, runs in ((True, _plain_runs), (False, _shared_runs)):
            places = [index for index, one in enumerate(alone) if one == whole]
            some = [interventions[index] for index in places]
            if some:
                found[places] = runs(model, tokens, source, some, readout, description)
        return found
    return _shared_runs(model, tokens, source, interventions, readout, description)


def _needs_a_run(model: CausalLM, change: Patch | Resample | Cut) -> bool:
    """Whether a change cannot be made to a run that others share: it is a callable, or of embeddings read twice."""
    if isinstance(change, Cut):
        return False
    if isinstance(change, Patch) and callable(change.value):
        return True
    beside = any(given_embeddings(model.layers[layer]) for layer in range(model.n_layers))
    return beside and resolve(model, change.site, change.layer).site.name == "embed"


def _shared_runs(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    source: Int[Tensor, "B L"] | None,
    interventions: Sequence[Sequence[Patch | Resample | Cut]],
    readout: Readout,
    description: str | None,
) -> Float[Tensor, "I B K"]:
    """A sweep whose runs start from one base run."""
    checked = [_changes(model, tokens, changes, source) for changes in interventions]
    model.require_stream("sweeps")
    limits = Budget.of(model, tokens.shape[1])
    read = readout.read
    shape = len(interventions), *read.shape
    parts = []
    with tqdm(total=shape[0] * shape[1], desc=description, unit="run", disable=description is None) as bar:
        for start in range(0, shape[1], limits.prompts):
            part = slice(start, start + limits.prompts)
            prompts = Prompts(tokens[part], None if source is None else source[part], readout.last[part], read[part])
            own = [[change.rows(part, shape[1]) for change in changes] for changes in checked]
            parts.append(_logits(model, prompts, own, limits, bar))
    return torch.cat(parts, dim=1) if parts else torch.empty(shape)


def _plain_runs(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    source: Int[Tensor, "B L"] | None,
    interventions: Sequence[Sequence[Patch | Resample | Cut]],
    readout: Readout,
    description: str | None,
) -> Float[Tensor, "I B K"]:
    """A sweep of which every intervention is a run of the whole prompts.

    So it is where no family says what blocks read, and where a callable is to see every row.
    """
    refuse_touched(model, "sweeps")
    values: dict[str, Tensor] = {}
    results, read = [], readout.read
    for changes in tqdm(interventions, desc=description, unit="run", disable=description is None):
        patches = []
        for change in changes:
            if isinstance(change, Cut):
                model.require_mamba("cuts")
                patches.append(change)
                continue
            checked = _checked(model, tokens, change, source)
            if checked.value is None and source is not None:
                ref = SiteRef(checked.site, checked.layer)
                if ref.key not in values:
                    values |= cache(model, source, [ref.key])
                value, positions = values[ref.key], checked.positions
                if isinstance(positions, Tensor):
                    value = value[torch.arange(len(value))[:, None], positions.clamp(min=0)]
                elif positions is not None:
                    value = value[:, positions]
                value = value[(..., *checked.part)]
                change = Patch(checked.site.name, checked.layer, value, positions, change.slice, change.channels)
            patches.append(change)
        logits = run(model, tokens, patches, positions=readout.last, source=source)
        results.append(picked(logits, read.to(logits.device)).to("cpu", compute_dtype(logits.dtype)))
    return torch.stack(results) if results else torch.empty(0, *read.shape)


def _checked(model: CausalLM, tokens: Tensor, change: Patch | Resample, source: Tensor | None) -> Change:
    """The change, which a sweep can make."""
    if isinstance(change, Resample) and source is None:
        raise ValueError("a Resample needs source tokens to take its values from")
    return check_patch(model, tokens, change)


@dataclass(frozen=True)
class Budget:
    """How many prompts to hold the base run of, and how many patched rows to run at once.

    Attributes:
        prompts: rows of the base run (residual streams and states of every layer).
        rows: rows of one patched forward.
        values: bytes of the source run's values to hold at once; at least those of the runs from one position are.
        request: rows of all patched forwards that one request to a server asks for; None where there is no server.
    """

    prompts: int
    rows: int
    values: int
    request: int | None = None

    @classmethod
    def of(cls, model: CausalLM, length: int) -> Budget:
        """Divide the memory: 0.4 for what is held of the prompts, as much for the forward, the rest for values."""
        inputs = 8 * model.n_layers * length * model.d_channels
        held = 2 * stream_bytes(model, length) + state_bytes(model) + inputs
        return cls(
            prompts=fitting_rows(model, held, MOST_ROWS, share=0.4),
            rows=fitting_rows(model, forward_bytes(model, length), MOST_ROWS, share=0.4),
            values=budget(model) // 5,
            request=None if model.remote is None else REQUEST_ROWS,
        )


# ---------------------------------------------------------------------------------------------------------------------
# What to change
# ---------------------------------------------------------------------------------------------------------------------


def _changes(
    model: CausalLM, tokens: Tensor, given: Sequence[Patch | Resample | Cut], source: Tensor | None
) -> list[Change]:
    """What an intervention changes, inside layers."""
    found: list[Change] = []
    for one in given:
        if isinstance(one, Cut):
            found += check_cut(model, tokens, one, resampled=source is not None)
        else:
            found.append(_change(model, tokens, one, source))
    refuse_twice(found)
    return found


def _change(model: CausalLM, tokens: Tensor, change: Patch | Resample, source: Tensor | None) -> Change:
    """The change, inside a layer: the embeddings are what the first layer begins with."""
    checked = _checked(model, tokens, change, source)
    if checked.site.name == "embed":
        checked = replace(checked, site=model.layer_sites(0)["resid_pre"], layer=0)
    if checked.layer is None or not checked.site.by_position:
        raise ValueError(
            f"a sweep changes sites inside the layers that have positions, and embed; not {checked.site.name!r}"
        )
    return checked


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Some prompts of a sweep: `Readout` says what ``last`` and ``read`` are."""

    tokens: Int[Tensor, "B L"]
    source: Int[Tensor, "B L"] | None
    last: Int[Tensor, "B"]
    read: Int[Tensor, "B K"]

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        source = None if self.source is None else self.source.to(device)
        return Prompts(self.tokens.to(device), source, self.last.to(device), self.read.to(device))


def _logits(
    model: CausalLM, prompts: Prompts, interventions: Sequence[Sequence[Change]], limits: Budget, bar: tqdm
) -> Float[Tensor, "I B K"]:
    """The logits of every intervention on some prompts, here or by requests of bounded size to a server."""
    items = _pieces(_items(prompts, interventions, model.all_scans), limits.rows)
    bar.update(len(interventions) * len(prompts.tokens) - sum(len(item.rows) for item in items))
    waiting = [items] if limits.request is None else _batches(items, limits.request)[::-1]
    note = bar.update if model.remote is None else None
    plain, found = None, []
    while waiting:
        share = waiting.pop()
        try:
            answer = ask(model, run_items, prompts, share, aside=(limits.rows, limits.values, note))
        except TimeoutError:
            count = sum(len(item.rows) for item in share)
            if count < 2:
                raise
            logger.warning("%d patched runs in one request took too long; asking for half as many", count)
            waiting += _batches(share, (count + 1) // 2)[::-1]
            continue
        plain = answer["plain"] if plain is None else plain
        found += zip(share, answer["logits"].split([len(item.rows) for item in share]), strict=True)
        if model.remote is not None:
            bar.update(len(answer["logits"]))
    assert plain is not None  # at least one request was answered
    results = plain.expand(len(interventions), *plain.shape).clone()
    for item, logits in found:
        results[item.intervention, item.rows.cpu()] = logits
    return results


def _items(prompts: Prompts, interventions: Sequence[Sequence[Change]], states: bool) -> list[Item]:
    """The runs that differ from the clean one, by the position they start at and the first layer that changes.

    Where ``states`` are not all that positions leave behind, every run starts at the first one.
    """
    tokens, source, last = prompts.tokens, prompts.source, prompts.last.tolist()
    batch, length = tokens.shape
    differs = [0] * batch if source is None else divergence_index(tokens, source).tolist()
    items = []
    for index, changes in enumerate(interventions):
        starts: dict[int, list[int]] = defaultdict(list)
        given = any(change.value is not None for change in changes)  # what is resampled is then not what is there
        from_row = [0] * batch if given else differs
        begins = []  # of each change, in each row
        for change in changes:
            own, common = row_positions(change), change.everywhere(length)
            begins.append(
                [first_changed(change, own[row] if own else common, from_row[row], length) for row in range(batch)]
            )
        for row in range(batch):
            start = min((begin[row] for begin in begins), default=length)
            if start <= last[row]:
                starts[start if states else 0].append(row)
        for start, rows in starts.items():
            live = [one for one, begin in zip(changes, begins, strict=True) if any(begin[r] < length for r in rows)]
            items.append(Item(index, start, torch.tensor(rows, device=tokens.device), live))
    return sorted(items, key=lambda item: (item.start, item.layer))


def _pieces(items: Sequence[Item], limit: int) -> list[Item]:
    """The items, those that change several layers of the same prompts cut so that one batch holds all for some rows.

    They can share what they have in common only in one batch.
    """
    families: dict[tuple[int, ...], list[Item]] = defaultdict(list)
    pieces = []
    for item in items:
        if len({change.layer for change in item.changes}) > 1:
            families[(item.start, *item.rows.tolist())].append(item)
        else:
            pieces.append(item)
    for family in families.values():
        for rows in family[0].rows.split(max(1, limit // len(family))):
            pieces += [Item(item.intervention, item.start, rows, item.changes) for item in family]
    return sorted(pieces, key=lambda item: item.start)


def run_items(
    model: CausalLM,
    prompts: Prompts,
    items: Sequence[Item],
    limit: int,
    room: int,
    note: Callable[[int], object] | None,
) -> dict[str, Tensor]:
    """Run the prompts once, and patched runs that go on from that run; this is what travels to a server.

    Args:
        model: a Mamba.
        prompts: the prompts.
        items: the patched runs, ordered by start and layer.
        limit: how many rows run at once.
        room: how many bytes of the source run's values are held at once, about.
        note: called with the number of rows that were run.

    Returns:
        ``plain``: the unpatched run's logits [B, K]; ``logits``: those of the items' rows one after another [rows, K].
    """
    cut = {change.layer or 0 for item in items for change in item.changes if change.sources is not None}
    base = BaseRun(model, prompts, sorted(cut))
    found = [base.plain[:0].cpu()]
    runs = [list(together) for _, together in groupby(items, key=lambda item: item.start)]
    values: SourceValues = {}
    for index, together in enumerate(runs):
        if not base.wanted(together) <= values.keys():
            values = {}
            values = base.source_values(runs[index:], room)
        found += base.run(together[0].start, [item.to(base.plain.device) for item in together], limit, values, note)
    return {"plain": base.plain.cpu(), "logits": torch.cat(found)}


class BaseRun:
    """The base run of some prompts, kept as far as patched runs start from it."""

    def __init__(self, model: CausalLM, prompts: Prompts, cut: Sequence[int] = ()) -> None:
        self.model = model
        tokens = prompts.tokens.to(model.device)
        refs = [resolve(model, "resid_pre", layer) for layer in range(model.n_layers)]
        refs += [resolve(model, name, layer) for layer in cut for name in (*NAMES, "A")]
        plan = Plan([], refs, model.n_layers)
        where = read_positions(tokens, prompts.last)
        with torch.no_grad(), model.trace(tokens):
            outcome = forward(model, plan, where).save()
        found, logits = outcome
        self.prompts = prompts.to(logits.device)  # in a server's sandbox this is not where the model is
        self.plain = picked(logits, self.prompts.read).to(compute_dtype(logits.dtype))
        self.resid = [found[ref.key] for ref in refs[: model.n_layers]]
        self.inflow = {layer: {name: found[f"blocks.{layer}.hook_{name}"] for name in (*NAMES, "A")} for layer in cut}
        self.position = 0  # the states are those before this position
        self.states: list[LayerState] | None = None

    def run(
        self, start: int, items: Sequence[Item], limit: int, values: SourceValues, note: Callable[[int], object] | None
    ) -> list[Float[Tensor, "rows K"]]:
        """The logits of items that start at one position, at or after that of the call before."""
        self._advance(start)
        found = []
        for together in _batches(items, limit):
            found.append(self._run_from(start, together, values))
            if note is not None:
                note(len(found[-1]))
        return found

    def wanted(self, items: Sequence[Item]) -> set[tuple[int, str, int]]:
        """Every (layer, site, position) that items resample, from where they start on."""
        length = self.prompts.tokens.shape[1]
        return {key for item in items for change in item.changes for key in change.resampled(length, item.start)}

    def source_values(self, runs: Sequence[Sequence[Item]], room: int) -> SourceValues:
        """The source run's values that the first of the runs want, and those after it as far as there is room."""
        source = self.prompts.source
        if source is None:
            return {}
        sizes = {"B": len(source), "L": 1, **self.model.sizes()}
        keys: set[tuple[int, str, int]] = set()
        for items in runs:
            more = self.wanted(items) - keys
            shapes = [self.model.layer_sites(layer)[name].shape for layer, name, _ in more]
            room -= sum(4 * math.prod(sizes[letter] for letter in shape) for shape in shapes)
            if keys and room < 0:
                break
            keys |= more
        return source_values(self.model, source, keys)

    def carried(self, item: Item, values: SourceValues) -> dict[int, Tensor]:
        """Of an item's cuts, by their place among its changes, what the sources before its start give to the state."""
        found = {}
        for index, change in enumerate(item.changes):
            if change.sources is None:
                continue
            base = self.inflow[change.layer or 0]
            dtype, A = compute_dtype(base["A"].dtype), base["A"]
            inflow = {name: base[name][item.rows, : item.start].to(dtype) for name in NAMES}
            (kind,) = (one for one in self.model.operations(change.layer or 0).values() if one.KIND == "scan")
            sources = mask(change.sources, item.rows, len(item.rows), 0, item.start, A.device)
            new = Placed(change).new_writes(kind, item.rows, values, dtype)
            state = carry(kind, inflow, A.to(dtype), sources, new)
            if state is not None:
                found[index] = state
        return found

    def _advance(self, position: int) -> None:
        """Bring the base run's states to those before ``position``."""
        if position == self.position:
            return
        segment = self.prompts.tokens[:, self.position : position]
        self.states, self.position = run_prefix(self.model, segment, self.states), position

    def _run_from(self, start: int, items: Sequence[Item], values: SourceValues) -> Float[Tensor, "R K"]:
        """The logits of a batch of items that start at one position."""
        order = entries(items, self.model.n_layers)
        rows = torch.cat([entry.item.rows for entry in order])
        batch = Batch(
            start=start,
            rows=rows,
            entries=order,
            resid=self.resid,
            states=self.states,
            values=values,
            last=self.prompts.last[rows] - start,
            carried=[self.carried(entry.item, values) for entry in order],
        )
        dummy = self.prompts.tokens[:1, start:]
        model = self.model
        with torch.no_grad(), model.trace(dummy):
            logits = run_batch(model, batch).save()  # pyright: ignore[reportAttributeAccessIssue]
        logits = picked(logits, self.prompts.read[rows]).to(self.plain).cpu()
        found = {id(entry.item): logits[entry.rows] for entry in order}
        return torch.cat([found[id(item)] for item in items])


def _batches(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """The items in batches of at most ``limit`` rows, large items cut."""
    batches: list[list[Item]] = [[]]
    room = limit
    for item in items:
        rows = item.rows
        while len(rows):
            if not room:
                batches.append([])
                room = limit
            taken, rows = rows[:room], rows[room:]
            batches[-1].append(Item(item.intervention, item.start, taken, item.changes))
            room -= len(taken)
    return batches
