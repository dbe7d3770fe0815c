"""The two operations inside a mixer, the convolution and the scan, as chains of values that can be read and edited.

This file is shipped to remote servers: it uses torch and nnsight alone, and calls a base class by its name, since the
methods travel as source and a bare ``super()`` does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nnsight.intervention import source
from torch import Tensor

from .scan import PatchFn, compute_dtype, discretize_A, discretize_B, held_scan, read_out, scan_states, selective_scan


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


class ConvStages(Stages):
    """The causal convolution: ``conv_slice`` [B, L, E, K] (terms), ``conv`` [B, L, E] (their sum and the bias).

    Attributes:
        before: the conv's input at the K - 1 positions before the first, ``[B, E, K - 1]``; zeros where None.
        state: the cache's inputs of this layer's conv, ``[B, E, S]``, where one token continues it.
    """

    OPERATION = "source.causal_conv1d_fn_0"
    STEP = "source.causal_conv1d_update_0"
    RECORDS = True
    ORDER = ("conv_slice", "conv")
    weight: Tensor

    def __init__(
        self, args: tuple, kwargs: dict, length: int | None = None, single: bool = False, runs: bool = False
    ) -> None:
        Stages.__init__(self, runs)
        self.state = args[1] if single else None
        self.x, self.weight = args[0], args[1 + single]
        self.bias = args[2 + single] if len(args) > 2 + single else kwargs.get("bias")
        self.before: Tensor | None = None
        _refuse_narrowed(self.weight, self.x)
        taps = self.weight.shape[-1] - 1
        if self.state is not None:
            self.before = self.state[..., self.state.shape[-1] - taps :].clone()
        elif length is not None and length < self.x.shape[-1]:  # the cache puts earlier inputs, or zeros, in front
            earlier, self.x = self.x[..., :-length], self.x[..., -length:]
            self.before = F.pad(earlier, (max(0, taps - earlier.shape[-1]), 0))[..., -taps:] if taps else None
        self.in_front = args[0].shape[-1] - self.x.shape[-1]

    def result(self) -> Tensor:
        if self.state is not None and not self.runs:
            self.state.copy_(torch.cat([self.state, self.x], dim=-1)[..., -self.state.shape[-1] :])
        conv, spare = self.take("conv")
        output = F.silu(conv, inplace=spare is not None).to(self.x.dtype).transpose(1, 2)
        return F.pad(output, (self.in_front, 0)) if self.in_front else output

    def _conv_slice(self) -> Tensor:
        dtype = compute_dtype(self.weight.dtype)  # in which the terms of a half-precision model are exact
        return conv_terms(self.x.to(self.weight.dtype), self.weight.to(dtype), self.before)

    def _conv(self) -> Tensor:
        terms = self._known("conv_slice")
        if terms is not None and ("conv_slice" in self.kept or terms.requires_grad):
            last, *earlier = terms.unbind(-1)[::-1]
            total = last if self.bias is None else self.bias.to(terms.dtype) + last
            for term in earlier:  # in the order of `convolve`, so that terms which are as they were change nothing
                total = total + term
            return total.to(self.weight.dtype)
        return convolve(self.x, self.weight, self.bias, self.before)


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
        _refuse_narrowed(self.A, x)
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
        zeros = self.x.new_zeros(self.x.shape[0], self.x.shape[2], self.A.shape[-1])
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


def conv_terms(
    x: Float[Tensor, "B E L"], weight: Float[Tensor, "E K"], before: Float[Tensor, "B E K-1"] | None = None
) -> Float[Tensor, "B L E K"]:
    """The conv's terms: ``weight[:, k] * x`` at the position ``k - (K - 1)`` relative to each output position."""
    windows = _with_context(x, weight, before).unfold(-1, weight.shape[-1], 1)  # [B, E, L, K]
    return (windows * weight[:, None, :]).transpose(1, 2).contiguous()


def convolve(
    x: Float[Tensor, "B E L"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, "E"] | None,
    before: Float[Tensor, "B E K-1"] | None = None,
) -> Float[Tensor, "B L E"]:
    """The causal convolution, tap by tap: the sum of `conv_terms` and the bias, with no ``[B, L, E, K]`` tensor."""
    dtype = compute_dtype(weight.dtype)
    taps, length = weight.to(dtype), x.shape[-1]
    inputs = x.to(weight.dtype).transpose(1, 2).to(dtype)
    conv = inputs * taps[:, -1] if bias is None else torch.addcmul(bias.to(dtype), inputs, taps[:, -1])
    if before is not None:
        inputs = torch.cat([before.to(inputs).transpose(1, 2), inputs], dim=1)
    for back in range(1, weight.shape[-1]):
        reach = inputs[:, : max(0, inputs.shape[1] - back)][:, -length:]  # the last ones, `back` earlier
        conv[:, length - reach.shape[1] :].addcmul_(reach, taps[:, -1 - back])
    return conv.to(weight.dtype)


def _with_context(x: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
    """The conv's input with the K - 1 positions before it, zeros where None."""
    x = x.to(weight.dtype)
    return F.pad(x, (weight.shape[-1] - 1, 0)) if before is None else torch.cat([before.to(x), x], dim=-1)


def _refuse_narrowed(parameter: Tensor, x: Float[Tensor, "B E L"]) -> None:
    """nnsight tells a batch by its first dimension: of several invokes whose rows add up to E, it splits parameters."""
    if parameter.shape[0] != x.shape[1]:
        raise ValueError(
            f"the invokes' rows add up to d_inner ({x.shape[1]}), which nnsight cannot tell from the layer's "
            f"parameters: trace one row more or fewer"
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
