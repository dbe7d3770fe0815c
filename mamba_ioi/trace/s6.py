"""The selective scan of a mixer (Mamba's S6) as a chain of values, the states among them.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .s6_scan import (
    PatchFn,
    compute_dtype,
    discretize_A,
    discretize_B,
    held_scan,
    read_out,
    scan_states,
    selective_scan,
)
from .stages import Handed, Stages, cast, refuse_narrowed
from .state import LayerState


class ScanStages(Stages):
    """The selective scan. Where ``h`` is edited at some positions, the states after them follow.

    Attributes:
        initial: the state before the first position, ``[B, E, N]``; zeros where None.
        state: the cache's state of this layer, ``[B, E, N]``, where one token continues it.
        patch: what replaces states on the way, or None.
        held: the positions that ``patch`` replaces; None if it may replace any.
        last: the state after the last position, once the outputs were computed.
        shown: the states handed out under gradients: a leaf's copy, whose gradient the live states feed.
    """

    KIND = "scan"
    OPERATION = "source.mamba_selective_scan_0"
    STEP = "source.mamba_selective_state_update_0"
    ORDER = ("A", "delta_2", "delta", "A_bar", "B_bar", "write", "h_start", "h", "y", "ssm_output", "after_skip")
    INDEPENDENT = (
        *(("A", name) for name in ("delta_2", "delta", "B_bar", "write", "h_start")),
        *((name, "h_start") for name in ("delta_2", "delta", "A_bar", "B_bar", "write")),
        *(("A_bar", name) for name in ("B_bar", "write")),
    )

    def __init__(
        self, args: tuple, kwargs: dict, length: int | None = None, single: bool = False, runs: bool = False
    ) -> None:
        Stages.__init__(self, runs)
        self.state, self.z = args[0] if single else None, kwargs.get("z")
        x, self.dt, self.A, B, C = args[single : 5 + single]
        self.D = args[5 + single] if len(args) > 5 + single else kwargs.get("D")
        if single:  # one token, without the dimension of positions
            x, self.dt, B, C = (tensor[..., None] for tensor in (x, self.dt, B, C))
            self.z = None if self.z is None else self.z[..., None]
        refuse_narrowed(self.A, x)
        self.output_dtype, self.dtype = x.dtype, compute_dtype(x.dtype)
        self.x, self.B, self.C = (tensor.transpose(1, 2).to(self.dtype) for tensor in (x, B, C))
        self.bias = kwargs.get("dt_bias" if single else "delta_bias")
        self.return_last_state = kwargs.get("return_last_state", False)
        self.initial: Tensor | None = None if self.state is None else self.state.to(self.dtype, copy=True)
        self.patch: PatchFn | None = None
        self.held: set[int] | None = set()
        self.last: Tensor | None = None
        self.shown: Tensor | None = None

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

    def go_on_from(self, state: LayerState) -> None:
        self.initial = state.ssm

    def h_shape(self) -> tuple[int, int, int]:
        """The shape of the state at one position, ``[B, E, N]``."""
        return self.x.shape[0], self.x.shape[2], self.A.shape[-1]

    def end(self) -> Tensor:
        """The state after the last position, which a later position goes on from."""
        with self.exact():
            self._settle()
            if self.last is None:
                self._value("y")
            return self._h()[:, -1] if self.last is None else self.last  # None where y was given from outside

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

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        output = self.take("after_skip")[0].transpose(1, 2)
        if self.state is not None:
            self.state.copy_(self.end())
            return output[..., 0].to(self.output_dtype)
        return (output, self.end()) if self.return_last_state else output

    def _edited(self, name: str, before: Tensor | None, after: Tensor, copy: Tensor | None) -> None:
        if name != "h":
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

    def _A(self) -> Tensor:
        return self.A.to(self.dtype, copy=True)

    def _delta_2(self) -> Tensor:
        dt = self.dt.transpose(1, 2).to(self.dtype).clone(memory_format=torch.contiguous_format)  # as the scan needs it
        return dt if self.bias is None else dt.add_(self.bias.to(self.dtype))

    def _delta(self) -> Tensor:
        return F.softplus(self.take("delta_2")[0])

    def _A_bar(self) -> Tensor:
        return discretize_A(self._value("delta"), self._value("A"))

    def _B_bar(self) -> Tensor:
        return discretize_B(self._value("delta"), self.B)

    def _write(self) -> Tensor:
        return self._value("B_bar") * self.x[..., None]

    def _h_start(self) -> Tensor:
        if self.initial is not None:
            return self.initial.clone()
        zeros = self.x.new_zeros(*self.h_shape())
        return zeros.requires_grad_(self.x.requires_grad).clone()

    def _h(self) -> Tensor:
        delta, A = self._value("delta"), self._value("A")
        A_bar, B_bar, write = (self._known(name) for name in ("A_bar", "B_bar", "write"))
        return scan_states(
            self.x,
            lambda t: discretize_A(delta[:, t], A) if A_bar is None else A_bar[:, t],
            lambda t: discretize_B(delta[:, t], self.B[:, t]) if B_bar is None else B_bar[:, t],
            initial=self._value("h_start"),
            patch=self.patch,
            write=None if write is None else lambda t: write[:, t],
        )

    def _y(self) -> Tensor:
        if self.held is None or {"h", "A_bar", "B_bar", "write"} & {*self.values, *self.leaves}:
            known = "h" in self.values and self.shown is None
            states = self.values["h"] if known else self._h()
            self.last = states[:, -1]
            return read_out(states, self.C)
        inputs = self.x, self.take("delta")[0], self.take("A")[0], self.B, self.C
        if self.patch is None:
            start = self._known("h_start")
            y, self.last = selective_scan(*inputs, initial=self.initial if start is None else start)
        else:
            y, self.last = held_scan(*inputs, initial=self._value("h_start"), patch=self.patch, positions=self.held)
        return y

    def _ssm_output(self) -> Tensor:
        y, spare = self.take("y")
        if self.D is None:
            return y.clone() if spare is None else y
        return torch.addcmul(y, self.x, self.D.to(self.dtype), out=spare)

    def _after_skip(self) -> Tensor:
        output, spare = self.take("ssm_output")
        if self.z is None:
            return output.clone() if spare is None else output
        return torch.mul(output, F.silu(self.z.transpose(1, 2).to(self.dtype)), out=spare)


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
