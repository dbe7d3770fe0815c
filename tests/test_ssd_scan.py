"""Mamba-2's scan against a loop written out, Hugging Face's, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from mamba_ioi.trace import ssd_scan as ssd
from mamba_ioi.trace.recurrence import every_state as states
from mamba_ioi.trace.ssd_scan import held_ssd, ssd_outputs, ssd_read_out, ssd_scan

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
HEADS, SIZE, STATE = 4, 3, 5


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_inputs(batch=3, length=7, heads=HEADS, size=SIZE, groups=1, state=STATE, dtype=torch.float64):
    """x, delta, A, B, C of a scan."""
    x, delta = normal(batch, length, heads, size, seed=1), F.softplus(normal(batch, length, heads, seed=2))
    A, B = -torch.exp(normal(heads, seed=3)), normal(batch, length, groups, state, seed=4)
    return tuple(tensor.to(dtype) for tensor in (x, delta, A, B, normal(batch, length, groups, state, seed=5)))


def start(batch=3, heads=HEADS, size=SIZE, state=STATE, dtype=torch.float64):
    """A state before the first position."""
    return normal(batch, heads, size, state, seed=6, dtype=dtype)


def written_out(x, delta, A, B, C, initial=None, patch=None):
    """Outputs and states, ``[B, L, H, P]`` and ``[B, L, H, P, N]``: the definition, in numpy, head by head."""
    x, delta, A, B, C = (tensor.detach().double().numpy() for tensor in (x, delta, A, B, C))
    (rows, length, heads, size), (groups, state) = x.shape, B.shape[2:]
    h = np.zeros((rows, heads, size, state)) if initial is None else initial.detach().double().numpy().copy()
    y, states = np.zeros_like(x), np.zeros((rows, length, heads, size, state))
    for t in range(length):
        for row in range(rows):
            for head in range(heads):
                group = head // (heads // groups)
                kept = np.exp(delta[row, t, head] * A[head])
                write = delta[row, t, head] * np.outer(x[row, t, head], B[row, t, group])
                h[row, head] = kept * h[row, head] + write
        if patch is not None:
            h = patch(t, torch.from_numpy(h)).numpy().copy()
        for row in range(rows):
            for head in range(heads):
                y[row, t, head] = h[row, head] @ C[row, t, head // (heads // groups)]
        states[:, t] = h
    return torch.from_numpy(y), torch.from_numpy(states)


def plain(x, delta, A, B, C, initial):
    """Outputs and last state by torch's operations alone, as autograd sees them."""
    per_group, h, outputs = x.shape[2] // B.shape[2], initial, []
    for t in range(x.shape[1]):
        b, c = (tensor[:, t].repeat_interleave(per_group, dim=1) for tensor in (B, C))
        write = torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], b)
        h = torch.exp(delta[:, t] * A)[..., None, None] * h + write
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, c))
    return torch.stack(outputs, dim=1), h


def every_state(x, delta, A, B, **kwargs):
    """`every_state` of heads, with the plain discretization."""
    per_group = x.shape[2] // B.shape[2]

    def write(t):
        return torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t].repeat_interleave(per_group, dim=1))

    return states(x.shape[1], lambda t: torch.exp(delta[:, t] * A)[..., None, None], write, **kwargs)


def patch(t, h):
    """What depends on the position and on the state."""
    return h * 2 + t


@pytest.fixture(params=[(96, 2**19), (4, 1), (3, 2 * 3 * HEADS * SIZE)], ids=["as it is", "row by row", "two rows"])
def cut(request, monkeypatch):
    """Chunks and blocks as they are, and so small that there are several."""
    monkeypatch.setattr(ssd, "_CHUNK", request.param[0])
    monkeypatch.setattr(ssd, "_BLOCK", request.param[1])


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 13])
def test_the_scan_written_out(cut, length, groups, begun):
    inputs, initial = random_inputs(length=length, groups=groups), start() if begun else None
    y, states = written_out(*inputs, initial)
    found, last = ssd_scan(*inputs, initial=initial)
    torch.testing.assert_close(found, y, **CLOSE)
    torch.testing.assert_close(last, states[:, -1], **CLOSE)
    torch.testing.assert_close(ssd_outputs(*inputs, initial=initial), y, **CLOSE)


@pytest.mark.parametrize("length", [95, 96, 97, 192, 193, 400])
def test_lengths_about_the_longest_chunk(length):
    inputs = random_inputs(batch=1, length=length, heads=2)
    y, states = written_out(*inputs)
    found, last = ssd_scan(*inputs)
    torch.testing.assert_close(found, y, **CLOSE)
    torch.testing.assert_close(last, states[:, -1], **CLOSE)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_every_state_written_out(groups):
    x, delta, A, B, C = random_inputs(groups=groups)
    for change in (None, lambda t, h: patch(t, h) if t in (2, 5) else h):
        y, states = written_out(x, delta, A, B, C, start(), change)
        h = every_state(x, delta, A, B, initial=start(), patch=change)
        torch.testing.assert_close(h, states, **CLOSE)
        torch.testing.assert_close(ssd_read_out(h, C), y, **CLOSE)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("length", [1, 5, 20, 256, 300])
def test_the_scan_equals_hugging_faces(length, groups, begun):
    inputs = random_inputs(length=length, groups=groups, size=8, state=16, dtype=torch.float32)
    initial = start(size=8, state=16, dtype=torch.float32) if begun else None
    theirs = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    y, last = theirs(*inputs, 256, initial_states=initial, return_final_states=True)
    found = ssd_scan(*inputs, initial=initial)
    torch.testing.assert_close(found, (y, last), rtol=1e-4, atol=1e-4)
    assert found[0].dtype == found[1].dtype == torch.float32


def test_a_scan_can_be_cut_in_two():
    x, delta, A, B, C = random_inputs(length=9)
    y, last = ssd_scan(x, delta, A, B, C)
    first, middle = ssd_scan(x[:, :4], delta[:, :4], A, B[:, :4], C[:, :4])
    second, end = ssd_scan(x[:, 4:], delta[:, 4:], A, B[:, 4:], C[:, 4:], initial=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, **CLOSE)
    torch.testing.assert_close(end, last, **CLOSE)


@pytest.mark.parametrize("positions", [[], [0], [6], [3, 2], [0, 4, 6], range(7)])
def test_holding_states_without_keeping_the_others(cut, positions):
    inputs, seen = random_inputs(groups=2), []

    def noted(t, h):
        seen.append(t)
        return patch(t, h)

    y, states = written_out(*inputs, start(), lambda t, h: patch(t, h) if t in positions else h)
    found, last = held_ssd(*inputs, initial=start(), patch=noted, positions=positions)
    torch.testing.assert_close(found, y, **CLOSE)
    torch.testing.assert_close(last, states[:, -1], **CLOSE)
    assert seen == sorted(positions)


def test_a_state_that_is_held_at_its_own_value_changes_nothing():
    inputs = random_inputs()
    held = held_ssd(*inputs, initial=start(), patch=lambda t, h: h, positions=[1, 4])
    torch.testing.assert_close(held, ssd_scan(*inputs, initial=start()), **CLOSE)


def test_gradients_through_held_states():
    inputs = [tensor.requires_grad_() for tensor in (*random_inputs(batch=2, length=4, heads=2, size=2, state=2),)]
    initial = start(2, 2, 2, 2).requires_grad_()

    def held(*tensors):
        return held_ssd(*tensors[:5], initial=tensors[5], patch=lambda t, h: h * h + t, positions=[1, 3])

    assert torch.autograd.gradcheck(held, (*inputs, initial))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [2, 5])
def test_gradients_by_finite_differences(monkeypatch, length, groups, begun):
    monkeypatch.setattr(ssd, "_CHUNK", 2)
    inputs = [
        t.requires_grad_() for t in random_inputs(batch=2, length=length, heads=2, size=2, groups=groups, state=2)
    ]
    initial = [start(2, 2, 2, 2).requires_grad_()] if begun else []

    def scan(*tensors):
        return ssd_scan(*tensors[:5], initial=tensors[5] if begun else None)

    assert torch.autograd.gradcheck(scan, (*inputs, *initial))
    assert torch.autograd.gradcheck(lambda *tensors: scan(*tensors)[1], (*inputs[:4], inputs[4].detach(), *initial))


@pytest.mark.parametrize("begun", [False, True])
def test_gradients_of_gradients_by_finite_differences(begun):
    inputs = [t.requires_grad_() for t in random_inputs(batch=1, length=3, heads=2, size=1, groups=2, state=2)]
    initial = [start(1, 2, 1, 2).requires_grad_()] if begun else []

    def scan(*tensors):
        return ssd_scan(*tensors[:5], initial=tensors[5] if begun else None)

    assert torch.autograd.gradgradcheck(scan, (*inputs, *initial))
    assert torch.autograd.gradgradcheck(ssd_outputs, inputs)


@pytest.mark.parametrize("used", ["y", "last", "both"])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_gradients_that_keep_no_state_equal_autograds(cut, monkeypatch, groups, used):
    monkeypatch.setattr(ssd, "_HELD", 3 * 2 * HEADS * SIZE * STATE)
    inputs = [tensor.requires_grad_() for tensor in (*random_inputs(groups=groups), start())]
    chosen = {"y": [0], "last": [1], "both": [0, 1]}[used]
    weights = normal(3, 7, HEADS, SIZE, seed=7), normal(3, HEADS, SIZE, STATE, seed=8)

    def gradients(results, **kwargs):
        outputs, given = zip(*((results[i], weights[i]) for i in chosen), strict=True)
        return torch.autograd.grad(outputs, inputs, given, materialize_grads=True, **kwargs)

    expected = gradients(plain(*inputs))
    for kwargs in ({}, {"create_graph": True}):
        found = gradients(ssd_scan(*inputs[:5], initial=inputs[5]), **kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert sum(gradient.abs().max() > 0 for gradient in expected) == (5 if used == "last" else 6)  # C is not in last


def test_gradients_of_some_of_the_arguments():
    inputs, initial = random_inputs(), start()
    for place in range(6):
        some = [tensor.clone().requires_grad_(i == place) for i, tensor in enumerate((*inputs, initial))]
        found = torch.autograd.grad(ssd_outputs(*some[:5], initial=some[5]).sum(), some[place])
        expected = torch.autograd.grad(plain(*some)[0].sum(), some[place])
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("create_graph", [False, True])
def test_arguments_that_come_from_one_another(create_graph):
    _, _, A, B, C = random_inputs()
    x = normal(3, 7, HEADS, SIZE, seed=9).requires_grad_()

    def gradient(scan, **kwargs):
        y = scan(x, F.softplus(x[..., 0]), A, B * x[..., :1, 1:2], C)
        return torch.autograd.grad(y.sum(), x, **kwargs)[0]

    expected = gradient(lambda *tensors: plain(*tensors, torch.zeros_like(start()))[0])
    found = gradient(ssd_outputs, create_graph=create_graph)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_under_gradients_a_scan_keeps_its_arguments_and_no_state():
    inputs, kept = [tensor.requires_grad_() for tensor in random_inputs(length=50)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ssd_scan(*inputs)
    assert sum(kept) == sum(tensor.numel() for tensor in inputs)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    def __init__(self):
        TorchDispatchMode.__init__(self)
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
        )
        return result


@pytest.mark.parametrize("length", [24, 300])
def test_no_tensor_holds_the_states_of_all_positions(length):
    inputs = random_inputs(batch=2, length=length, heads=4, size=32, state=32, groups=2, dtype=torch.float32)
    initial, states = start(2, 4, 32, 32, torch.float32), 2 * length * 4 * 32 * 32
    with Largest() as all_of_them:
        every_state(*inputs[:4], initial=initial)
    assert all_of_them.numel == states  # what is looked for is seen
    runs = (
        lambda: ssd_scan(*inputs, initial=initial),
        lambda: ssd_outputs(*inputs),
        lambda: held_ssd(*inputs, initial=initial, patch=patch, positions=[3, 20]),
    )
    for run in runs:
        for wanted in (False, True):
            for tensor in inputs:
                tensor.requires_grad_(wanted)
            with Largest() as largest:
                y = run()
                y = y if isinstance(y, torch.Tensor) else y[0]
                if wanted:
                    torch.autograd.grad(y.sum(), inputs)
            assert largest.numel <= states / 10


def test_rows_are_independent(cut):
    inputs = random_inputs(groups=2)
    y, last = ssd_scan(*inputs, initial=start())
    for row in range(3):
        x, delta, A, B, C = (tensor if tensor.dim() == 1 else tensor[row : row + 1] for tensor in inputs)
        alone = ssd_scan(x, delta, A, B, C, initial=start()[row : row + 1])
        torch.testing.assert_close(alone, (y[row : row + 1], last[row : row + 1]), **CLOSE)
    others = [tensor.clone() for tensor in inputs]
    others[0][1] = torch.nan
    spoiled, _ = ssd_scan(*others, initial=start())
    assert torch.equal(spoiled[[0, 2]], y[[0, 2]]) and spoiled[1].isnan().all()


def test_later_positions_change_no_earlier_output(cut):
    inputs = random_inputs()
    y = ssd_outputs(*inputs)
    for place in (0, 1, 3, 4):
        other = [tensor.clone() for tensor in inputs]
        other[place][:, 5:] += 1
        changed = ssd_outputs(*other)
        assert torch.equal(changed[:, :5], y[:, :5]) and not torch.isclose(changed[:, 5:], y[:, 5:]).any()


def test_tensors_that_lie_otherwise_in_memory(cut):
    inputs, initial = random_inputs(groups=2), start()
    turned = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in (*inputs, initial)]
    assert not any(tensor.is_contiguous() for tensor in turned if tensor.dim() > 1)
    kept = [tensor.clone() for tensor in turned]
    torch.testing.assert_close(ssd_scan(*turned[:5], initial=turned[5]), ssd_scan(*inputs, initial=initial), **CLOSE)
    assert all(torch.equal(one, other) for one, other in zip(turned, kept, strict=True))
    weights = (normal(3, SIZE, HEADS, 7).transpose(1, 3), normal(3, STATE, SIZE, HEADS).transpose(1, 3))

    def gradients(tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(ssd_scan(*tensors[:5], initial=tensors[5]), tensors, weights)

    torch.testing.assert_close(gradients(turned), gradients((*inputs, initial)), **CLOSE)
    parts = torch.cat(
        [tensor.flatten(2) for tensor in (inputs[0], *inputs[3:])], dim=-1
    )  # as a conv's output holds them
    x, B, C = parts.split([HEADS * SIZE, 2 * STATE, 2 * STATE], dim=-1)
    parted = x.unflatten(-1, (HEADS, SIZE)), B.unflatten(-1, (2, STATE)), C.unflatten(-1, (2, STATE))
    torch.testing.assert_close(ssd_scan(parted[0], *inputs[1:3], *parted[1:]), ssd_scan(*inputs), **CLOSE)


def test_a_step_of_zero_writes_nothing_and_forgets_nothing(cut):
    x, delta, A, B, C = random_inputs()
    delta[:, 2:] = 0
    y, last = ssd_scan(x, delta, A, B, C, initial=start())
    _, states = written_out(x, delta, A, B, C, start())
    torch.testing.assert_close(last, states[:, 1], **CLOSE)
    torch.testing.assert_close(y[:, 6], ssd_read_out(last[:, None], C[:, 6:])[:, 0], **CLOSE)
    zero = torch.zeros_like(delta)
    assert torch.equal(ssd_scan(x, zero, A, B, C, initial=start())[1], start())
    assert not ssd_outputs(x, zero, A, B, C).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_what_decays_to_nothing(cut, scale, dtype):
    """Some positions forget all, others little: no NaN, and nothing of the one spoils the other's accuracy."""
    x, delta, A, B, C = random_inputs(length=13, groups=2, dtype=dtype)
    delta[:, ::3] *= scale
    x[:, ::3] /= scale
    inputs = [tensor.requires_grad_() for tensor in (x, delta, A, B, C, start(dtype=dtype))]
    y, states = written_out(*inputs)
    close = CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    found, last = ssd_scan(*inputs[:5], initial=inputs[5])
    torch.testing.assert_close(found, y.to(dtype), **close)
    torch.testing.assert_close(last, states[:, -1].to(dtype), **close)
    gradients = torch.autograd.grad(found.sum() + last.sum(), inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad([part.sum() for part in plain(*exact)], exact)
    for one, other in zip(gradients, expected, strict=True):
        size = other.abs().max().item()  # float32 rounds what the large steps scale up
        torch.testing.assert_close(
            one.double(), other, rtol=1e-4, atol=size * (1e-12 if dtype == torch.float64 else 1e-5)
        )


def test_an_infinite_rate_forgets_all():
    x, delta, A, B, C = random_inputs()
    A = torch.full_like(A, -torch.inf)
    y, states = written_out(x, delta, A, B, C, start())
    found, last = ssd_scan(x, delta, A, B, C, initial=start())
    torch.testing.assert_close(found, y, **CLOSE)
    torch.testing.assert_close(last, states[:, -1], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    inputs, initial = random_inputs(dtype=dtype), start(dtype=dtype)
    single = [tensor.float() for tensor in (*inputs, initial)]
    found = ssd_scan(*inputs, initial=initial)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(found, ssd_scan(*single[:5], initial=single[5]), strict=True))
    held = held_ssd(*inputs, initial=initial, patch=patch, positions=[3])
    torch.testing.assert_close(
        held, held_ssd(*single[:5], initial=single[5], patch=patch, positions=[3]), rtol=0, atol=0
    )


def test_float32_is_as_exact_as_float32_can_be():
    inputs = random_inputs(batch=1, length=500, size=16, state=32, dtype=torch.float32)
    y, states = written_out(*inputs)
    found, last = ssd_scan(*inputs)
    assert (found - y).abs().max() < 2e-6 * y.abs().max()
    assert (last - states[:, -1]).abs().max() < 2e-6 * states.abs().max()
