"""The scan of a mixer as a chain of values: what S6 and SSD have in common, which is how their states are held.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .mixing import Units
from .recurrence import PatchFn, every_state
from .stages import Handed, Stages, cast
from .state import LayerState


class ScanStages(Stages):
    """A scan. Where ``h`` is edited at some positions, the states after them follow.

    Attributes:
        initial: the state before the first position, ``[B, ...]``; zeros where None.
        state: the cache's state of this layer, ``[B, ...]``, where one token continues it.
        patch: what replaces states on the way, or None.
        held: the positions that ``patch`` replaces; None if it may replace any.
        ends: whether the state after the last position will be asked for.
        last: that state, once the outputs were computed.
        shown: the states handed out under gradients: a leaf's copy, whose gradient the live states feed.
    """

    KIND = "scan"
    INDEPENDENT = (
        *(("A", name) for name in ("delta_2", "delta", "B_bar", "write", "h_start")),
        *((name, "h_start") for name in ("delta_2", "delta", "A_bar", "B_bar", "write")),
        *(("A_bar", name) for name in ("B_bar", "write")),
    )
    A: Tensor
    B: Tensor
    C: Tensor

    def __init__(self, runs: bool, state: Tensor | None) -> None:
        Stages.__init__(self, runs)
        self.state = state
        self.initial: Tensor | None = None
        self.patch: PatchFn | None = None
        self.held: set[int] | None = set()
        self.ends = False
        self.last: Tensor | None = None
        self.shown: Tensor | None = None

    def h_shape(self) -> tuple[int, ...]:
        """The shape of the state at one position, ``[B, ...]``."""
        raise NotImplementedError

    def inflow(self) -> dict[str, Tensor]:
        """What the states follow from, but for A: ``ssm_input``, ``delta`` and ``B``."""
        raise NotImplementedError

    def next_state(self, h: Tensor, inflow: dict[str, Tensor], t: int) -> Tensor:
        """The state after position ``t`` of a run with that `inflow`, from the state before it."""
        delta, B, x = (inflow[name][:, t] for name in ("delta", "B", "ssm_input"))
        return self.decay(delta, self.A.to(h)) * h + self.written(x, delta, B)

    @staticmethod
    def decay(delta: Tensor, A: Tensor) -> Tensor:
        """``A_bar`` at one position, as it multiplies a state."""
        raise NotImplementedError

    @staticmethod
    def spread(A_bar: Tensor) -> Tensor:
        """``A_bar`` at one position, as it multiplies a state."""
        raise NotImplementedError

    @staticmethod
    def entered(B_bar: Tensor, x: Tensor) -> Tensor:
        """``write`` at one position, or at several, from ``B_bar`` there."""
        raise NotImplementedError

    @staticmethod
    def written(x: Tensor, delta: Tensor, B: Tensor) -> Tensor:
        """``write`` at one position, or at several, from what `inflow` has there."""
        raise NotImplementedError

    @staticmethod
    def units(flow: Mapping[str, Tensor], A: Tensor) -> Units:
        """A run's scan by its units, channels or heads, from its `flow`."""
        raise NotImplementedError

    def flow(self) -> dict[str, Tensor]:
        """What the outputs follow from, but for A and D: `inflow`, and ``C``."""
        return self.inflow() | {"C": self.C.clone()}

    def by_unit(self) -> Units:
        """The scan by its units: channels, or heads."""
        return self.units(self.flow(), self.peek("A"))

    def decay_at(self, t: int) -> Tensor:
        """``A_bar`` at a position of this run, as it multiplies a state."""
        A_bar = self._known("A_bar")
        if A_bar is not None:
            return self.spread(A_bar[:, t])
        return self.decay(self._value("delta")[:, t], self._value("A"))

    def write_at(self, t: int) -> Tensor:
        """``write`` at a position of this run."""
        write, B_bar = self._known("write"), self._known("B_bar")
        if write is not None:
            return write[:, t]
        if B_bar is not None:
            return self.entered(B_bar[:, t], self.x[:, t])
        return self.written(self.x[:, t], self._value("delta")[:, t], self.B[:, t])

    def read(self, h: Tensor, t: int, rows: slice = slice(None)) -> Tensor:
        """``y`` of some rows at a position of this run, were their states those (of several runs, in front)."""
        raise NotImplementedError

    def go_on_from(self, state: LayerState) -> None:
        self.initial = state.ssm

    def get(self, name: str) -> Tensor:
        """The stage's value; ``h.grad`` is the total derivative, with what flows through later states.

        Under gradients h is read before y and what follows: those that were read before it are no part of that.
        """
        if name == "h" and self.shown is None:
            with self.exact():
                self._settle()
                if self._value("h").requires_grad:
                    shown = self._value("h").detach().requires_grad_().clone()
                    self._show(shown)
                    self.handed["h"] = Handed.of("h", shown)
        return Stages.get(self, name)

    def end(self) -> Tensor:
        """The state after the last position, which a later position goes on from."""
        with self.exact():
            self._settle()
            if self.last is None:
                self.ends = True
                if "y" not in self.kept:  # else y was given from outside
                    self.values.pop("y", None)
                    self._value("y")
            return self._h()[:, -1] if self.last is None else self.last

    def scan(self, patch) -> Tensor:
        """Replace states by ``patch`` (None, a mapping position -> state, or a callable) and return every state."""
        self.own = True
        if patch is not None:
            self.hold(*patch_function(patch, self.x.shape[1]))
        return self.get("h")

    def hold(self, patch: PatchFn, positions: Iterable[int] | None) -> None:
        """Replace the states after ``positions`` (None: any) from now on, on top of those replaced before."""
        with self.exact():
            self._settle()
            self._replace_states(patch, positions)

    def _edited(self, name: str, before: Tensor | None, after: Tensor, copy: Tensor | None) -> None:
        if name != "h":
            if self.ORDER.index(name) < self.ORDER.index("y"):
                self.last = None
            return Stages._edited(self, name, before, after, copy)
        known = copy if before is None else before
        held, changed = after.clone(), known != after
        positions = changed.transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
        self.handed.pop("h", None)
        self._replace_states(lambda t, h: torch.where(changed[:, t], held[:, t], h), positions)
        if before is None:  # the caller may go on editing what it holds
            with torch.no_grad():
                after.detach().copy_(self._h())
            self.values["h"] = after
            self.handed["h"] = Handed.of("h", after)

    def _became_leaf(self, name: str, leaf: Tensor) -> None:
        if name == "h":
            self._show(leaf)
        else:
            Stages._became_leaf(self, name, leaf)

    def _show(self, shown: Tensor) -> None:
        """Let the live states feed the gradient of the states that were handed out."""
        self.shown, handed = shown, self.handed.pop("h", None)
        self._replace_states(lambda t, h: h + (shown[:, t] - shown[:, t].detach()), None)
        self.values["h"] = shown
        if handed is not None:
            self.handed["h"] = handed

    def _replace_states(self, patch: PatchFn, positions: Iterable[int] | None) -> None:
        earlier = self.patch
        self.patch = patch if earlier is None else (lambda t, h: patch(t, earlier(t, h)))
        self.held = None if positions is None or self.held is None else self.held | set(positions)
        self.own, self.last = True, None
        if "h" in self.values:
            self._forget("h")
        self._forget_after("h")

    def _h_start(self) -> Tensor:
        if self.initial is not None:
            return self.initial.clone()
        return self.x.new_zeros(*self.h_shape()).requires_grad_(self.x.requires_grad).clone()

    def _write(self) -> Tensor:
        return self.entered(self._value("B_bar"), self.x)

    def _h(self) -> Tensor:
        start = self._value("h_start")
        return every_state(self.x.shape[1], self.decay_at, self.write_at, initial=start, patch=self.patch)

    def _keeps_states(self) -> bool:
        """Whether the outputs are read out of every state: some are known, or any of them may be replaced."""
        return self.held is None or bool({"h", "A_bar", "B_bar", "write"} & {*self.values, *self.leaves})

    def _read_states(self) -> Tensor:
        """The states that the outputs are read out of."""
        states = self.values["h"] if "h" in self.values and self.shown is None else self._h()
        self.last = states[:, -1]
        return states


def patch_function(patch: Mapping[int, Tensor] | PatchFn, length: int) -> tuple[PatchFn, set[int] | None]:
    """A mapping position -> state, or a callable ``(position, h) -> h``, as a callable, and the positions it changes.

    Raises:
        ValueError: for a position outside the prompt, or a patch of another type.
    """
    if callable(patch):
        return patch, None
    if not isinstance(patch, Mapping):
        raise ValueError(f"scan() takes a mapping position -> state or a callable, not {type(patch).__name__}")
    states = {}
    for position, state in patch.items():
        if not -length <= position < length:
            raise ValueError(f"position {position} is outside the prompt's {length} positions")
        states[position % length] = state
    return lambda t, h: cast(states[t], h) if t in states else h, set(states)
