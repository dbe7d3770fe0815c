"""The two operations inside a mixer, the convolution and the scan, as chains of values that can be read and edited.

This file is shipped to remote servers: it uses torch and nnsight alone, and calls a base class by its name, since the
methods travel as source and a bare ``super()`` does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nnsight.intervention import source
from torch import Tensor

from .scan import PatchFn, compute_dtype, discretize_A, discretize_B, held_scan, read_out, scan_states, selective_scan


class Stages:
    """One operation of the mixer as a chain of named values, each computed from those before it when asked for.

    A stage that is edited (in place or by assignment) is kept, and what is made from it is computed again. That holds
    for a value that is out of date as well, because a stage before it was edited since it was handed out: if it is
    edited then, it is as if it was assigned.

    Attributes:
        own: whether our own result replaces the model's even if nothing was edited.
        given: the stages whose values were handed out.
        stale: values that were handed out and are out of date: name, value, its version.
        OPERATION: the call in `MambaMixer.forward`, as nnsight names it.
        ORDER: the values' names, each after those that it is computed from.
        INDEPENDENT: pairs of stages, of which the second comes later and does not depend on the first.
    """

    OPERATION: str
    ORDER: tuple[str, ...]
    INDEPENDENT: tuple[tuple[str, str], ...] = ()

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.kept: set[str] = set()
        self.given: set[str] = set()
        self.stale: list[tuple[str, Tensor, int]] = []
        self.own = False

    def get(self, name: str) -> Tensor:
        """The stage's value: the caller may edit it in place."""
        self._settle()
        self.given.add(name)
        return self._value(name)

    def _value(self, name: str) -> Tensor:
        """The stage's value, for a later one to be made from."""
        if name not in self.values:
            self._store(name, getattr(self, f"_{name}")())
        return self.values[name]

    def take(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A stage's value for a later one to be made from, and where that may be written.

        That is into the value itself if nobody was given it, and else (None), as under gradients, into new memory.
        """
        if name in self.values or torch.is_grad_enabled():
            return self._value(name), None
        value = getattr(self, f"_{name}")()
        return value, value

    def set(self, name: str, value: Tensor | float) -> None:
        """Replace the stage's value, broadcast to its shape."""
        current = self.get(name)
        self._edited(name, current, cast(value, current))

    def finish(self):
        """What replaces the operation's result: ours, or the sign that the model's own is to be computed."""
        self._settle()
        if self.own or self.kept or any(value.requires_grad for value in self.values.values()):
            return self.result()
        return source.NO_SKIP  # by way of its module: a server compares it by identity with its own

    def result(self):
        """The operation's result, as the model's own function returns it."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Take note of the values that were edited in place since they were handed out, the last stage first."""
        held = [*self.stale, *((name, value, self.versions[name]) for name, value in self.values.items())]
        edited = [(name, value) for name, value, version in held if value._version != version]
        if edited:
            self.stale = [one for one in self.stale if one[1]._version == one[2]]
        for name, value in sorted(edited, key=lambda one: self.ORDER.index(one[0]), reverse=True):
            self._edited(name, None, value)

    def _edited(self, name: str, before: Tensor | None, after: Tensor) -> None:
        self._store(name, after)
        self.kept.add(name)
        self._forget_after(name)

    def _store(self, name: str, value: Tensor) -> None:
        self.values[name], self.versions[name] = value, value._version

    def _forget_after(self, name: str) -> None:
        for later in self.ORDER[self.ORDER.index(name) + 1 :]:
            if later not in self.kept and later in self.values and (name, later) not in self.INDEPENDENT:
                self._forget(later)

    def _forget(self, name: str) -> None:
        value = self.values.pop(name)
        if name in self.given:
            self.stale.append((name, value, self.versions[name]))


class ConvStages(Stages):
    """The causal convolution: ``conv_slice`` [B, L, E, K] (terms), ``conv`` [B, L, E] (their sum and the bias).

    Attributes:
        before: the conv's input at the K - 1 positions before the first, ``[B, E, K - 1]``; zeros where None.
    """

    OPERATION = "source.causal_conv1d_fn_0"
    ORDER = ("conv_slice", "conv")
    x: Tensor
    weight: Tensor

    def __init__(self, args: tuple, kwargs: dict) -> None:
        Stages.__init__(self)
        self.x, self.weight = args[:2]
        self.bias = args[2] if len(args) > 2 else kwargs.get("bias")
        self.before: Tensor | None = None
        _refuse_narrowed(self.weight, self.x)

    def result(self) -> Tensor:
        conv, spare = self.take("conv")
        return F.silu(conv, inplace=spare is not None).to(self.x.dtype).transpose(1, 2)

    def _conv_slice(self) -> Tensor:
        return conv_terms(self.x, self.weight, self.before)

    def _conv(self) -> Tensor:
        terms = self.values.get("conv_slice")
        if terms is not None and ("conv_slice" in self.kept or terms.requires_grad):
            total = terms.sum(-1)
            return total if self.bias is None else total + self.bias
        return convolve(self.x, self.weight, self.bias, self.before)


class ScanStages(Stages):
    """The selective scan. Where ``h`` is edited at some positions, the states after them follow.

    Attributes:
        initial: the state before the first position, ``[B, E, N]``; zeros where None.
        patch: what replaces states on the way, or None.
        held: the positions that ``patch`` replaces; None if it may replace any.
        last: the state after the last position, once the outputs were computed.
        shown: the states handed out under gradients: a leaf's copy, whose gradient the live states feed.
        unedited: the states that were handed out beside what they are made from, each with a copy of it.
    """

    OPERATION = "source.mamba_selective_scan_0"
    ORDER = ("A", "delta_2", "delta", "A_bar", "B_bar", "h_start", "h", "y", "ssm_output", "after_skip")
    INDEPENDENT = (
        *(("A", name) for name in ("delta_2", "delta", "B_bar", "h_start")),
        *((name, "h_start") for name in ("delta_2", "delta", "A_bar", "B_bar")),
        ("A_bar", "B_bar"),
    )

    def __init__(self, args: tuple, kwargs: dict) -> None:
        Stages.__init__(self)
        x, self.dt, self.A, B, C = args[:5]
        _refuse_narrowed(self.A, x)
        self.dtype = compute_dtype(x.dtype)
        self.x, self.B, self.C = (tensor.transpose(1, 2).to(self.dtype) for tensor in (x, B, C))
        self.D, self.z, self.bias = kwargs.get("D"), kwargs.get("z"), kwargs.get("delta_bias")
        self.return_last_state = kwargs.get("return_last_state", False)
        self.initial: Tensor | None = None
        self.patch: PatchFn | None = None
        self.held: set[int] | None = set()
        self.last: Tensor | None = None
        self.shown: Tensor | None = None
        self.unedited: list[tuple[Tensor, Tensor]] = []

    def get(self, name: str) -> Tensor:
        """The stage's value; ``h.grad`` is the total derivative, with what flows through later states.

        Under gradients h is read before y and what follows: those that were read before it are no part of that.
        """
        value = Stages.get(self, name)
        before = self.ORDER[: self.ORDER.index("h")]
        if "h" in self.given and "h" in self.values and self.given.intersection(before):
            states = self.values["h"]  # which of them are edited can only be told while nothing before them is
            if not any(known is states for known, _ in self.unedited):
                self.unedited.append((states, states.detach().clone()))
        if name != "h" or not value.requires_grad or self.shown is not None:
            return value
        self.shown = shown = value.detach().requires_grad_().clone()
        self._replace_states(lambda t, h: h + (shown[:, t] - shown[:, t].detach()), None)
        self._store("h", shown)
        return shown

    def scan(self, patch) -> Tensor:
        """Replace states by ``patch`` (None, a mapping position -> state, or a callable) and return every state."""
        self.own = True
        if patch is not None:
            self.hold(*patch_function(patch, self.x.shape[1]))
        return self.get("h")

    def hold(self, patch: PatchFn, positions: Iterable[int] | None) -> None:
        """Replace the states after ``positions`` (None: any) from now on, on top of those replaced before."""
        self._settle()
        self._replace_states(patch, positions)

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        output = self.take("after_skip")[0].transpose(1, 2)
        if not self.return_last_state:
            return output
        if self.last is None:  # the outputs were given from outside
            self.last = self._h()[:, -1]
        return output, self.last

    def _edited(self, name: str, before: Tensor | None, after: Tensor) -> None:
        if name != "h":
            return Stages._edited(self, name, before, after)
        in_place = before is None
        self.values.pop("h", None)
        if in_place:
            before = next((copy for known, copy in self.unedited if known is after), None)
            before = self._h() if before is None else before
            self.unedited = [one for one in self.unedited if one[0] is not after]
        held, changed = after.clone(), before != after
        positions = changed.transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
        self._replace_states(lambda t, h: torch.where(changed[:, t], held[:, t], h), positions)
        if in_place:  # the caller may go on editing what it holds
            with torch.no_grad():
                after.detach().copy_(self._h())
            self._store("h", after)

    def _replace_states(self, patch: PatchFn, positions: Iterable[int] | None) -> None:
        earlier = self.patch
        self.patch = patch if earlier is None else (lambda t, h: patch(t, earlier(t, h)))
        self.held = None if positions is None or self.held is None else self.held | set(positions)
        self.own = True
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

    def _h_start(self) -> Tensor:
        if self.initial is not None:
            return self.initial.clone()
        zeros = self.x.new_zeros(self.x.shape[0], self.x.shape[2], self.A.shape[-1])
        return zeros.requires_grad_(self.x.requires_grad).clone()

    def _h(self) -> Tensor:
        delta, A = self._value("delta"), self._value("A")
        A_bar, B_bar = self.values.get("A_bar"), self.values.get("B_bar")
        return scan_states(
            self.x,
            lambda t: discretize_A(delta[:, t], A) if A_bar is None else A_bar[:, t],
            lambda t: discretize_B(delta[:, t], self.B[:, t]) if B_bar is None else B_bar[:, t],
            initial=self._value("h_start"),
            patch=self.patch,
        )

    def _y(self) -> Tensor:
        if self.held is None or {"h", "A_bar", "B_bar"} & set(self.values):
            known = "h" in self.values and self.shown is None
            states = self.values["h"] if known else self._h()
            self.last = states[:, -1]
            return read_out(states, self.C)
        inputs = self.x, self.take("delta")[0], self.take("A")[0], self.B, self.C
        if self.patch is None:
            y, self.last = selective_scan(*inputs, initial=self.values.get("h_start", self.initial))
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


def cast(value, like: Tensor) -> Tensor:
    """``value`` with the shape, dtype and device that the model has there."""
    value = torch.as_tensor(value).to(like)
    if value.shape == like.shape:
        return value
    try:
        return value.expand(like.shape)
    except RuntimeError:
        raise ValueError(f"a value of shape {tuple(value.shape)} does not fit {tuple(like.shape)}") from None
