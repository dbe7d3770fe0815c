"""One operation of a mixer as a chain of named values that can be read and edited.

This file is shipped to remote servers: it uses torch and nnsight alone, and calls a base class by its name, since the
methods travel as source and a bare ``super()`` does not.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from nnsight.intervention import source
from torch import Tensor

from .state import LayerState


@dataclass(eq=False)
class Handed:
    """A stage's value that was handed out, and what it was then.

    Attributes:
        name: the stage.
        value: the tensor that the reader has.
        version: its version counter.
        copy: its content.
        graded: whether gradients were taken of it.
    """

    name: str
    value: Tensor
    version: int
    copy: Tensor
    graded: bool

    @classmethod
    def of(cls, name: str, value: Tensor) -> Handed:
        """The value as it is now."""
        return cls(name, value, version_of(value), value.detach().clone(), value.requires_grad)

    def edited(self) -> bool:
        """Whether the reader changed it."""
        return version_of(self.value) != self.version or not same_bits(self.value, self.copy)


class Stages:
    """One operation of the mixer as a chain of named values, each computed from those before it when asked for.

    A stage that is edited (in place or by assignment) is kept, and what is made from it is computed again. That holds
    for a value that is out of date as well, because a stage before it was edited since it was handed out: if it is
    edited then, it is as if it was assigned. A stage that becomes a leaf (``requires_grad_()``) after it was handed out
    gets its total derivative, whatever else was read before.

    Attributes:
        own: whether our own result replaces the model's even if nothing was edited.
        handed: the values that were handed out and are up to date, by stage.
        stale: those that are out of date.
        leaves: the values that became leaves after they were handed out, by stage.
        KIND: ``conv`` or ``scan``.
        OPERATION: the call in the mixer's ``forward``, as nnsight names it.
        STEP: the call in its place where a cache is continued by one token.
        RECORDS: whether a cache that records what it is given has the whole prompt's call made all the same.
        ORDER: the values' names, each after those that it is computed from.
        INDEPENDENT: pairs of stages, of which the second comes later and does not depend on the first.

    Args:
        args: of the operation's call.
        kwargs: of the call.
        length: how many positions are run; None for all that the operation is given.
        single: whether the operation is the one that continues a cache by one token.
        runs: whether the model's own operation runs all the same (in a batch of several invokes).
    """

    KIND: str
    OPERATION: str
    STEP: str
    RECORDS = False
    ORDER: tuple[str, ...]
    x: Tensor
    INDEPENDENT: tuple[tuple[str, str], ...] = ()

    def __init__(self, runs: bool) -> None:
        self.runs = runs
        self.values: dict[str, Tensor] = {}
        self.handed: dict[str, Handed] = {}
        self.stale: list[Handed] = []
        self.leaves: dict[str, Tensor] = {}
        self.kept: set[str] = set()
        self.own = runs

    @classmethod
    def operation(cls, single: bool) -> str:
        """The call that computes these values, for a whole prompt or for one token more."""
        return cls.STEP if single else cls.OPERATION

    def exact(self):
        """Our own conv and scan run in the precision of their inputs, and in float32 at least, under autocast too."""
        kind = self.x.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def get(self, name: str) -> Tensor:
        """The stage's value: the caller may edit it in place."""
        with self.exact():
            self._settle()
            value = self.leaves[name] if name in self.leaves else self._value(name)
            if name not in self.handed:
                self.handed[name] = Handed.of(name, value)
        return value

    def peek(self, name: str) -> Tensor:
        """The stage's value, for a caller who does not change it."""
        with self.exact():
            self._settle()
            return self._value(name)

    def _value(self, name: str) -> Tensor:
        """The stage's value, for a later one to be made from."""
        if name not in self.values:
            value = getattr(self, f"_{name}")()
            leaf = self.leaves.get(name)
            self.values[name] = value if leaf is None else value + (leaf - leaf.detach())
        return self.values[name]

    def _known(self, name: str) -> Tensor | None:
        """The stage's value if it was asked for before."""
        return self._value(name) if name in self.values or name in self.leaves else None

    def take(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A stage's value for a later one to be made from, and where that may be written.

        That is into the value itself if nobody was given it, and else (None), as under gradients, into new memory.
        """
        if name in self.values or name in self.leaves or torch.is_grad_enabled():
            return self._value(name), None
        value = getattr(self, f"_{name}")()
        return value, value

    def set(self, name: str, value: Tensor | float) -> None:
        """Replace the stage's value, broadcast to its shape."""
        with self.exact():
            self._settle()
            current = self._value(name)
            self._edited(name, current, cast(value, current), None)

    def finish(self):
        """What replaces the operation's result: ours, or the sign that the model's own is to be computed."""
        with self.exact():
            self._settle()
            if self.own or self.kept or any(value.requires_grad for value in self.values.values()):
                return self.result()
        return source.NO_SKIP  # by way of its module: a server compares it by identity with its own

    def go_on_from(self, state: LayerState) -> None:
        """Begin with what earlier positions left behind in this layer."""
        raise NotImplementedError

    def end(self) -> Tensor:
        """What the operation leaves behind for later positions."""
        raise NotImplementedError

    def result(self):
        """The operation's result, as the model's own function returns it."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Take note of what was done to the values since they were handed out, the last stage first."""
        edited = [one for one in [*self.stale, *self.handed.values()] if one.edited()]
        self.stale = [one for one in self.stale if one not in edited]
        for one in sorted(edited, key=lambda one: self.ORDER.index(one.name), reverse=True):
            if one.value.shape != one.copy.shape:
                shapes = tuple(one.value.shape), tuple(one.copy.shape)
                raise ValueError(f"{one.name} was given the shape {shapes[0]}; there it has {shapes[1]}")
            self._edited(one.name, None, one.value, one.copy)
            self.handed[one.name].graded = one.graded
        for one in list(self.handed.values()):
            if one.value.requires_grad and not one.graded:
                one.graded = True
                self._became_leaf(one.name, one.value)

    def _edited(self, name: str, before: Tensor | None, after: Tensor, copy: Tensor | None) -> None:
        """A stage has a new value: by assignment (``before`` is what it replaces), or edited in place (``copy`` is)."""
        self.values[name] = after
        self.handed.pop(name, None)
        if before is None:
            self.handed[name] = Handed.of(name, after)
        self.kept.add(name)
        for later in self.ORDER[self.ORDER.index(name) :]:
            self.leaves.pop(later, None)
        self._forget_after(name)

    def _became_leaf(self, name: str, leaf: Tensor) -> None:
        """Let gradients reach a value that asks for them after it was handed out, and what it is made of."""
        self.own = True
        if name not in self.kept:
            self.leaves[name] = leaf
            self.values.pop(name, None)
        self._forget_after(name)

    def _forget_after(self, name: str) -> None:
        for later in self.ORDER[self.ORDER.index(name) + 1 :]:
            if later not in self.kept and later in self.values and (name, later) not in self.INDEPENDENT:
                self._forget(later)

    def _forget(self, name: str) -> None:
        self.values.pop(name)
        if name in self.handed and name not in self.leaves:
            self.stale.append(self.handed.pop(name))


def refuse_narrowed(parameter: Tensor, size: int) -> None:
    """nnsight tells a batch by its first dimension: of several invokes whose rows add up to that, it splits parameters.

    Args:
        parameter: as the operation was given it.
        size: the size that its first dimension has in the model.
    """
    if parameter.shape[0] != size:
        raise ValueError(
            f"the invokes' rows add up to {size}, the first size of one of the layer's parameters, from which nnsight "
            f"cannot tell a batch: trace one row more or fewer"
        )


def version_of(value: Tensor) -> int:
    """A tensor's version counter; 0 where it has none, in inference mode."""
    return 0 if value.is_inference() else value._version


def same_bits(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, not-a-numbers included."""
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    value, other = value.detach(), other.detach()
    if not value.is_floating_point():
        return torch.equal(value, other)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return torch.equal(value.view(bits), other.view(bits))


def cast(value, like: Tensor) -> Tensor:
    """``value`` with the shape, dtype and device that the model has there."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.shape == like.shape:
        return value
    try:
        return value.expand(like.shape)
    except RuntimeError:
        raise ValueError(f"a value of shape {tuple(value.shape)} does not fit {tuple(like.shape)}") from None
