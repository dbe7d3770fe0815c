"""Values inside a trace: where nnsight serves them, the copies that are handed out, and how edits are written back.

All that reaches into nnsight's inner parts is here. What is read is the reader's own copy. Before the trace moves on to
another location, the copies are looked at: one whose version counter or whose content has changed was edited and is
written back. The content is compared because the counter does not see everything (``x.data``, numpy's view of a tensor,
tensors made in inference mode).

A generation runs each mixer once a step. With the cache, every step after the first runs one token, for which the mixer
calls other functions: `visit_of` tells which, so that a site is found at every step.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent
from nnsight import Envoy
from nnsight.intervention.eproperty import WriteBack, eproperty
from nnsight.intervention.interleaver import Event, Mediator, Pending
from torch import Tensor

from .stages import Stages, cast, same_bits, version_of

AnyStages = TypeVar("AnyStages", bound=Stages)

# ---------------------------------------------------------------------------------------------------------------------
# What nnsight does not do by itself
# ---------------------------------------------------------------------------------------------------------------------


def write_back(mediator: Mediator) -> None:
    """Write back what waits, and stay at the step that a loop over ``tracer.iter`` has come to.

    Serving what waits from the step before would release the step that the next request is meant for.
    """
    step = mediator.iteration
    mediator.flush()
    mediator.iteration = step


def open_source(obj: Envoy, key: str) -> None:
    """Look into the mixer's operations before the run is inside it, whichever site of the layer is asked for.

    A server's model may be one that nobody has looked into yet, and a mixer that already runs serves none of them. The
    envoys' classes have no name here: they hold sites, which cannot be rebuilt on a server before this function is.
    """
    look_inside = getattr(type(obj), "look_inside", None)
    if look_inside is not None:
        write_back(Mediator.current(key))
        look_inside(obj)


def in_sandbox() -> bool:
    """Whether requests are another function than nnsight's own, as in NDIF's sandbox."""
    return Mediator.event.__func__.__module__ != Mediator.__module__


def wait(mediator: Mediator, waiting: WriteBack) -> None:
    """Leave an edit to be written back before the worker's next request.

    In an NDIF sandbox a request is another function, which leaves out the writing back; here it gets that again.
    """
    request = Mediator.event.__func__
    if in_sandbox() and not hasattr(request, "flushes"):

        def event(cls, kind, location, *rest):
            write_back(cls.current(location))
            return request(cls, kind, location, *rest)

        event.flushes = True
        Mediator.event = classmethod(event)  # pyright: ignore[reportAttributeAccessIssue]
    mediator.transform = waiting


@dataclass(frozen=True)
class Visit:
    """One run of a mixer in a trace.

    Attributes:
        number: which one it is, counted from 0; a generation makes one a step.
        length: how many positions it runs; None where the run was inside the mixer before anyone asked.
        single: whether it goes on from a cache by one token.
        records: whether the cache keeps what it is given, to go back to it; then the conv is the one of whole prompts.
    """

    number: int
    length: int | None = None
    single: bool = False
    records: bool = False

    def step(self, stages: type[Stages]) -> bool:
        """Whether it calls the operation that continues a cache by one token."""
        return self.single and not (self.records and stages.RECORDS)


def look_before(mixer: Envoy) -> None:
    """Keep of what comes before a mixer what may be asked for after it, where its class says what that is."""
    before = getattr(type(mixer), "before_entry", None)
    if before is not None:
        before(mixer)


def note_visit(mixer: Envoy) -> Visit | None:
    """The visit of a mixer that the next request is meant for, None if the run is already inside and nobody has asked.

    Asking waits until the run enters the mixer, so only what lies inside it asks. In a sandbox, where nobody counts
    what the run has passed, the first visit is not asked for: it might be too late.
    """
    entry = f"{mixer.path}.input"
    look_before(mixer)
    mediator = Mediator.current(entry)
    number = mediator.wanted(f"{mixer.path}.output")
    seen: dict[tuple[str, int], Visit] = mediator.__dict__.setdefault("visits_of_mixers", {})
    key = mixer.path, number + mediator.counts_at_start.get(f"{mixer.path}.output", 0)  # an edit's worker runs again
    if number == 0 and in_sandbox():
        return None
    if key not in seen and mediator.occurrence(entry) <= number:
        args, kwargs = Mediator.value(entry)
        x = args[0] if args else kwargs["hidden_states"]
        module: Any = mixer._module
        visit, layer = Visit(number, x.shape[1]), module.layer_idx
        for cache in (*args, *kwargs.values()):  # its name depends on transformers' version
            if hasattr(cache, "update_conv_state"):
                begun = layer < len(cache.layers) and bool(cache.has_previous_state(layer))
                visit = Visit(number, x.shape[1], begun and x.shape[1] == 1, begun and cache.layers[layer].record_past)
        seen[key] = visit
    elif mediator.iteration and mediator.occurrence(f"{mixer.path}.output") == number:
        mediator.iteration = None  # a second loop over the step that is running
    return seen.get(key)


def visit_of(mixer: Envoy) -> Visit:
    """`note_visit`, or what can be told of a visit from inside: the first one of a run begins with no cache.

    Raises:
        ValueError: if it cannot be told.
    """
    visit = note_visit(mixer)
    if visit is not None:
        return visit
    location = f"{mixer.path}.output"
    number = Mediator.current(location).wanted(location)
    if number == 0:
        return Visit(number)
    raise ValueError(
        f"{mixer.path} was entered through its operations at this step; read one of its sites, or its in_proj, before "
        f"anything of its .source"
    )


class Noted:
    """One of nnsight's own values of a module inside a mixer, asked for after `note_visit`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, obj: Any, owner: Any = None):
        if obj is None:
            return self
        note_visit(obj.parent)
        return getattr(Envoy, self.name).__get__(obj, owner)

    def __set__(self, obj: Any, value: Any) -> None:
        note_visit(obj.parent)
        getattr(Envoy, self.name).__set__(obj, value)


# ---------------------------------------------------------------------------------------------------------------------
# Values at the inputs and outputs of modules
# ---------------------------------------------------------------------------------------------------------------------


class Views:
    """What a worker holds of one location's value: the copies that its sites handed out, which may still be edited.

    Attributes:
        raw: the value as the model has it, or as it was assigned.
        held: the site, its envoy, the copy, and the version of the copy that ``raw`` agrees with.
        visit: the mixer's visit that it belongs to, None outside the mixers.
    """

    def __init__(self, raw, visit: Visit | None = None) -> None:
        self.raw, self.visit = raw, visit
        self.held: list[tuple[Site, Envoy, Tensor, int]] = []

    def read(self, site: Site, obj: Envoy) -> Tensor:
        """A site's copy: the same one until it is assigned to."""
        for other, _, view, _ in self.held:
            if other is site:
                return view
        view = site.see(obj, self.value(), self.visit)
        self.held.append((site, obj, view, version_of(view)))
        return view

    def assign(self, site: Site, obj: Envoy, value) -> None:
        """Replace a site's part of the value."""
        raw = self.value()
        self.raw = site._transform(obj, cast(value, site.see(obj, raw, self.visit)), raw)
        self.held = [one for one in self.held if one[0] is not site]

    def value(self):
        """The value with the copies that were edited written back, and those that carry gradients."""
        raw = self.raw
        for site, obj, view, version in self.held:
            if self._edited(site, obj, view, version):
                shape = tuple(site.see(obj, raw, self.visit).shape)
                if view.shape != shape:
                    raise ValueError(f"{site.name} was given the shape {tuple(view.shape)}; there it has {shape}")
                raw = site._transform(obj, view.clone(), raw)  # the reader may go on with the copy
        return raw

    def _edited(self, site: Site, obj: Envoy, view: Tensor, version: int) -> bool:
        if version_of(view) != version or view.requires_grad:
            return True
        return not same_bits(view, site.see(obj, self.raw, self.visit))


class Site(eproperty):
    """An `eproperty` that serves a copy, writes it back if it was edited, and can be shipped to a server.

    The decorated function maps what the model has at ``key`` to what the user sees; ``.transform`` maps an edited
    view back. Nothing is written back for a view that was only read, except where it carries gradients: then the
    run goes through the view, so that its ``.grad`` is there. Sites that share a location, such as B and C, can be read
    one after another and edited then.
    """

    key: str
    _preprocess: Callable
    _transform: Callable

    def __init__(self, key: str, description: str) -> None:
        eproperty.__init__(self, key=key, description=description)

    def __reduce__(self):
        return _rebuild_site, (type(self), self.key, self.description, self._preprocess, self._transform)

    def __get__(self, obj: Any, owner: Any = None):
        if obj is None:
            return self
        return self._views(obj).read(self, obj)

    def __set__(self, obj: Any, value: Any) -> None:
        self._views(obj).assign(self, obj, value)

    def see(self, obj: Envoy, raw, visit: Visit | None) -> Tensor:
        """What the user sees of the model's value."""
        return self._preprocess(obj, raw)

    def place(self, obj: Any) -> tuple[str, Visit | None]:
        """The location, and the visit of the mixer that it lies in, None outside the mixers."""
        mixer = obj.mixer if self.key.startswith("mixer.") else obj
        return self._location(obj), note_visit(mixer) if getattr(type(mixer), "is_mixer", False) else None

    def _views(self, obj: Any) -> Views:
        """What the worker holds at this site's location, to be written back before its next request elsewhere."""
        location, visit = self.place(obj)
        mediator = Mediator.current(location)
        occurrence = mediator.wanted(location)
        waiting = mediator.transform
        place = None if waiting is None else (waiting.location, waiting.occurrence, type(waiting.view))
        if waiting is not None and place == (location, occurrence, Views):
            return waiting.view
        open_source(obj, self.key)
        views = Views(Mediator.value(location), visit)
        wait(mediator, WriteBack(views.value, views, self, location, occurrence))
        return views


def _rebuild_site(cls, place, description, preprocess, transform) -> eproperty:
    return cls(place, description)(preprocess).transform(transform)


class OperationSite(Site):
    """A `Site` at the output of one of the mixer's operations, whichever function computes it at that step."""

    def __init__(self, stages: type[Stages], description: str) -> None:
        Site.__init__(self, f"{stages.OPERATION}.output", description)
        self.stages = stages

    def __reduce__(self):
        return _rebuild_site, (type(self), self.stages, self.description, self._preprocess, self._transform)

    def see(self, obj, raw, visit):
        """The positions that the visit runs: with the cache, what the conv gives of earlier ones is thrown away."""
        value = self._preprocess(obj, raw)
        assert visit is not None  # `place` has told
        return value if visit.length is None else value[:, value.shape[1] - visit.length :]

    def place(self, obj):
        visit = visit_of(obj)
        return f"{obj.path}.{self.stages.operation(visit.step(self.stages))}.output", visit


class PartSite(Site):
    """A `Site` at the output of one of the model's parts, by its name in `Anatomy`."""

    def _location(self, obj: Any) -> str:
        return f"{obj.path}.{getattr(obj.anatomy, self.key)}.output"


class OutputSite(Site):
    """A `Site` of the model's output, or of its unembedding's where that gives the same, but for rounding."""

    def _location(self, obj: Any) -> str:
        return f"{obj.path}.{obj.anatomy.head}.output" if gives_output(obj) else f"{obj.path}.{self.key}"


def gives_output(model) -> bool:
    """Whether the unembedding gives the logits of the model's output, in a precision that may be higher."""
    return model.anatomy.plain and not model._edits and not model.unembedding._module._forward_hooks


def logits_of(output: Any) -> Tensor:
    """The logits of what a causal language model, or its unembedding, gives."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


def with_logits(output: Any, logits: Tensor) -> Any:
    """The same with other logits."""
    if isinstance(output, Tensor):
        return logits
    return (logits, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "logits": logits})


# ---------------------------------------------------------------------------------------------------------------------
# Values inside operations
# ---------------------------------------------------------------------------------------------------------------------


class StageSite(eproperty):
    """A value inside one of the mixer's operations: a stage of its `ConvStages` or `ScanStages`."""

    name: str

    def __init__(self, stages: type[Stages], description: str) -> None:
        eproperty.__init__(self, key=f"{stages.OPERATION}.input", description=description)
        self.stages = stages

    def __reduce__(self):
        return _rebuild_stage_site, (self.stages, self.description, self._preprocess)

    def __get__(self, obj: Any, owner: Any = None):
        if obj is None:
            return self
        return open_stages(obj, self.stages).get(self.name)

    def __set__(self, obj: Any, value: Any) -> None:
        open_stages(obj, self.stages).set(self.name, value)


def _rebuild_stage_site(stages, description, preprocess) -> eproperty:
    return StageSite(stages, description)(preprocess)


def open_stages(mixer: Envoy, cls: type[AnyStages], visit: Visit | None = None) -> AnyStages:
    """An operation of the mixer, opened for reading and editing; what was edited takes effect as the trace moves on.

    The operation is then skipped in favour of our own, except in a batch of several invokes, where it runs and each
    invoke replaces its rows of the output. ``visit`` is looked up where it is not given.
    """
    look_before(mixer)
    visit = visit_of(mixer) if visit is None else visit
    single = visit.step(cls)
    operation = f"{mixer.path}.{cls.operation(single)}"
    mediator = Mediator.current(operation)
    batcher = mediator.interleaver.batcher
    batching = batcher is not None and batcher.batching
    target = f"{operation}.output" if batching else f"{operation}.skip"
    occurrence = mediator.wanted(target)
    waiting = mediator.transform
    if waiting is not None and (waiting.location, waiting.occurrence) == (target, occurrence):
        return waiting.view
    open_source(mixer, cls.OPERATION)
    args, kwargs = Mediator.value(f"{operation}.input")
    alone = batching or len(mediator.interleaver.mediators) == 1
    stages = None if alone else _opened_by_another(mediator, operation)
    if stages is None:
        stages = cls(args, kwargs, visit.length, single, batching)  # pyright: ignore[reportCallIssue]
    if not alone:
        mediator.__dict__["opened"] = operation, mediator.interleaver.counts.get(f"{operation}.input", 0), stages
    finish = partial(_finish_after, stages, target, occurrence) if batching else stages.finish
    wait(mediator, WriteBack(finish, stages, cls, target, occurrence))
    return stages


def _opened_by_another(mediator: Mediator, operation: str):
    """The operation as another worker of this run, such as an edit of the model, has opened and changed it."""
    here = operation, mediator.interleaver.counts.get(f"{operation}.input", 0)
    for other in mediator.interleaver.mediators:
        if other is not mediator and other.__dict__.get("opened", ())[:2] == here:
            return other.__dict__["opened"][2]
    return None


def _finish_after(stages: Stages, output: str, occurrence: int):
    """What replaces the operation's result once it has run: it changes the cache's state, and then so do we."""
    getcurrent().parent.switch(  # pyright: ignore[reportOptionalMemberAccess]
        Pending(Event.VALUE, output, occurrence)
    )
    return stages.finish()


def replace_op(mixer: Envoy, cls: type[AnyStages]) -> AnyStages:
    """Open an operation in a run without a cache, and let our own replace it whatever is edited: it is faster."""
    stages = open_stages(mixer, cls, Visit(0))
    stages.own = True
    return stages
