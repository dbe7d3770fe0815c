"""The scan against Hugging Face's, real trained parameters, and finite differences."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mamba_ioi.interventions.patch import Patch
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.trace import s6_scan as scan
from mamba_ioi.trace.conv import ConvStages, convolve
from mamba_ioi.trace.s6_scan import discretize_A, discretize_B, held_scan, read_out, scan_states, selective_scan


def random_inputs(batch=3, length=7, inner=8, state=4, dtype=torch.float64, seed=0):
    """x, delta, A, B, C of a scan."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, delta = normal(batch, length, inner), F.softplus(normal(batch, length, inner))
    A, B, C = -torch.exp(normal(inner, state)), normal(batch, length, state), normal(batch, length, state)
    return tuple(tensor.to(dtype) for tensor in (x, delta, A, B, C))


def every_state(x, delta, A, B, **kwargs):
    """`scan_states` with the plain discretization."""
    kwargs.setdefault("initial", x.new_zeros(x.shape[0], x.shape[2], A.shape[1]))
    return scan_states(
        x, lambda t: discretize_A(delta[:, t], A), lambda t: discretize_B(delta[:, t], B[:, t]), **kwargs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_the_scan_equals_hugging_faces(dtype, length):
    x, delta, A, B, C = random_inputs(length=length, dtype=dtype)
    expected = (
        mamba_selective_scan.__wrapped__ if hasattr(mamba_selective_scan, "__wrapped__") else mamba_selective_scan
    )
    expected = expected(x.mT, delta.mT, A, B.mT, C.mT).mT
    y, _ = selective_scan(x, delta, A, B, C)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # theirs rounds B and x to float32


def test_the_fast_forms_equal_the_plain_steps():
    x, delta, A, B, C = random_inputs()
    h = every_state(x, delta, A, B)
    for inputs in ((x, delta, A, B, C), tuple(t.clone().requires_grad_() for t in (x, delta, A, B, C))):
        y, last = selective_scan(*inputs)
        torch.testing.assert_close(y, read_out(h, C), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last, h[:, -1], rtol=1e-12, atol=1e-12)


def test_the_recurrence_written_out():
    x, delta, A, B, C = random_inputs(batch=1, length=3, inner=1, state=1)
    h, outputs = 0.0, []
    for t in range(3):
        h = np.exp(delta[0, t, 0].item() * A.item()) * h + delta[0, t, 0].item() * B[0, t, 0].item() * x[0, t, 0].item()
        outputs.append(C[0, t, 0].item() * h)
    np.testing.assert_allclose(selective_scan(x, delta, A, B, C)[0].flatten().numpy(), outputs, rtol=1e-12)


def test_a_scan_can_be_cut_in_two():
    x, delta, A, B, C = random_inputs(length=9)
    y, last = selective_scan(x, delta, A, B, C)
    first, middle = selective_scan(x[:, :4], delta[:, :4], A, B[:, :4], C[:, :4])
    second, end = selective_scan(x[:, 4:], delta[:, 4:], A, B[:, 4:], C[:, 4:], initial=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_a_patched_state_is_held_and_later_ones_follow():
    x, delta, A, B, _ = random_inputs()
    value = torch.ones(3, 8, 4, dtype=torch.float64)
    plain = every_state(x, delta, A, B)
    patched = every_state(x, delta, A, B, patch=lambda t, h: value if t == 2 else h)
    torch.testing.assert_close(patched[:, :2], plain[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(patched[:, 2], value, rtol=0, atol=0)
    follow = every_state(x[:, 3:], delta[:, 3:], A, B[:, 3:], initial=value)
    torch.testing.assert_close(patched[:, 3:], follow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [[0], [6], [2, 3], [0, 4, 6]])
def test_holding_states_without_keeping_the_others(positions):
    x, delta, A, B, C = random_inputs()
    initial = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def patch(t, h):
        return h * 2 + t if t in positions else h

    h = every_state(x, delta, A, B, initial=initial, patch=patch)
    y, last = held_scan(x, delta, A, B, C, initial=initial, patch=patch, positions=positions)
    torch.testing.assert_close(y, read_out(h, C), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h[:, -1], rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in random_inputs(batch=2, length=4, inner=3, state=2)]
    initial = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args[:5], initial=args[5]), (*inputs, initial))


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = random_inputs(dtype=torch.bfloat16)
    y, last = selective_scan(*inputs)
    assert y.dtype == last.dtype == torch.float32
    torch.testing.assert_close(y, selective_scan(*(tensor.float() for tensor in inputs))[0], rtol=0, atol=0)


def test_real_parameters(shared):
    """One layer of mamba-130m, A_log from -7 to 12.6, states to 1e3: float64 against the recorded activations."""
    file = np.load(shared / "data" / "mamba130m_layer0.npz")
    data = {key: torch.from_numpy(file[key].astype(np.float64)) for key in file.files}
    branch, gate = data["2a_hidden_states_after_chunk"], data["2b_gate_after_chunk"]
    weight, bias = data["conv1d_weight"], data["conv1d_bias"]
    conv = ConvStages((branch[None], weight.squeeze(1), bias), {})
    x = F.silu(conv.get("conv"))  # [1, L, E]
    torch.testing.assert_close(conv.get("conv_slice").sum(-1) + bias, conv.get("conv"), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x[0].mT, data["4_hidden_states_after_conv"], atol=1e-6)

    rank = data["dt_proj_weight"].shape[1]
    delta_1, B, C = (x @ data["x_proj_weight"].mT).split([rank, 16, 16], dim=-1)
    np.testing.assert_allclose(torch.cat([delta_1, B, C], -1)[0], data["5a_ssm_parameters"], atol=1e-4)
    delta = F.softplus(delta_1 @ data["dt_proj_weight"].mT + data["dt_proj_bias"])
    np.testing.assert_allclose(delta[0].mT, data["5b_discrete_time_step"], atol=1e-5)

    A = -torch.exp(data["A_log"])
    np.testing.assert_allclose(A, data["6a_A_raw"], rtol=1e-6)
    for y in (selective_scan(x, delta, A, B, C)[0], read_out(every_state(x, delta, A, B), C)):
        np.testing.assert_allclose(y[0].mT, data["7a_scan_output_raw"], atol=2e-3)
        output = y + x * data["D"]
        np.testing.assert_allclose(output[0].mT, data["7b_scan_output_with_D"], atol=2e-3)
        np.testing.assert_allclose(output[0].mT * F.silu(gate), data["7c_scan_output_gated"], atol=3e-3)
    single = selective_scan(*(tensor.float() for tensor in (x, delta, A, B, C)))[0]
    assert (single - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
def test_a_few_rows_at_a_time_equal_every_state(monkeypatch, rows_at_once):
    x, delta, A, B, C = random_inputs()
    delta = delta.mT.contiguous().mT  # channels outermost, as in the model
    initial = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = initial.clone()
    monkeypatch.setattr(scan, "_BLOCK", rows_at_once * 8 * 4)
    y, last = selective_scan(x, delta, A, B, C, initial=initial)
    h = every_state(x, delta, A, B, initial=initial)
    torch.testing.assert_close(y, read_out(h, C), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h[:, -1], rtol=1e-12, atol=1e-12)
    again, _ = selective_scan(x, delta, A, B, C, initial=last)
    torch.testing.assert_close(last, h[:, -1], rtol=1e-12, atol=1e-12)
    assert torch.equal(initial, kept) and not torch.equal(again, y)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
def test_gradients_that_keep_no_state_equal_autograds(monkeypatch, rows_at_once):
    inputs = [tensor.requires_grad_() for tensor in (*random_inputs(), torch.randn(3, 8, 4, dtype=torch.float64))]
    monkeypatch.setattr(scan, "_HELD", rows_at_once * 7 * 8 * 4)
    weights = torch.randn(3, 7, 8, dtype=torch.float64), torch.randn(3, 8, 4, dtype=torch.float64)

    def gradients(form):
        return torch.autograd.grad(form(*inputs), inputs, weights)

    expected = gradients(scan._stepwise)
    found = gradients(lambda *tensors: selective_scan(*tensors[:5], initial=tensors[5]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in expected)


def test_gradients_against_finite_differences_and_gradients_of_gradients():
    inputs = [tensor.requires_grad_() for tensor in random_inputs(batch=2, length=3, inner=2, state=2)]
    assert torch.autograd.gradcheck(selective_scan, inputs)
    assert torch.autograd.gradgradcheck(selective_scan, inputs)


def test_under_gradients_a_scan_keeps_its_arguments_and_no_state():
    x, delta, A, B, C = (tensor.requires_grad_() for tensor in random_inputs(length=50))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(x, delta, A, B, C)
    initial = x.shape[0] * A.numel()
    assert sum(kept) == sum(tensor.numel() for tensor in (x, delta, A, B, C)) + initial


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_conv_by_taps_equals_torchs(dtype, length, context):
    g = torch.Generator().manual_seed(length)
    x, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((3, 5, length), (5, 4), (5,)))
    before = torch.randn(3, 5, 3, generator=g).to(dtype) if context else None
    padded = F.pad(x, (3, 0)) if before is None else torch.cat([before, x], dim=-1)
    for b in (bias, None):
        expected = F.conv1d(padded, weight[:, None], b, groups=5).transpose(1, 2)
        found = convolve(x, weight, b, before)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


class TestKernel:
    """mamba_ssm's kernel: a stand-in of the same calling convention, and the real one where it can run."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []

        def selective_scan_fn(u, delta, A, B, C, D=None, z=None, *, return_last_state=False):
            assert u.shape == delta.shape and B.shape == C.shape and D is None and z is None and return_last_state
            calls.append(tuple(u.shape))
            x, delta, B, C = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
            h = every_state(x, delta, A, B)
            return read_out(h, C).transpose(1, 2), h[:, -1]

        interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
        interface.selective_scan_fn = selective_scan_fn
        for name in ("mamba_ssm", "mamba_ssm.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
        monkeypatch.setattr("mamba_ioi.trace.s6_scan._KERNEL_DEVICE", "cpu")
        return calls

    def test_it_computes_what_needs_no_state(self, calls):
        x, delta, A, B, C = random_inputs(dtype=torch.float32)
        h = every_state(x, delta, A, B)
        y, last = selective_scan(x, delta, A, B, C)
        torch.testing.assert_close((y, last), (read_out(h, C), h[:, -1]))
        assert calls == [(3, 8, 7)]

    def test_not_in_float64_and_not_from_a_given_state(self, calls):
        selective_scan(*random_inputs())
        selective_scan(*random_inputs(dtype=torch.float32), initial=torch.zeros(3, 8, 4))
        assert calls == []

    def test_a_model_uses_it_unless_a_state_is_read_or_patched(self, calls, small, tokens):
        plain = run(small, tokens)
        assert len(calls) == 3
        state = cache(small, tokens, ["blocks.1.hook_h"])["blocks.1.hook_h"]
        calls.clear()
        patched = run(small, tokens, [Patch("h", 1, state[:, 4:5], 4)])
        assert len(calls) == 2
        torch.testing.assert_close(patched, plain)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_the_real_kernel(self):
        pytest.importorskip("mamba_ssm")
        inputs = [tensor.cuda() for tensor in random_inputs(dtype=torch.float32, inner=64, state=16)]
        cpu = selective_scan(*(tensor.cpu() for tensor in inputs))
        torch.testing.assert_close([part.cpu() for part in selective_scan(*inputs)], list(cpu), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("create_graph", [False, True])
def test_arguments_that_come_from_one_another(create_graph: bool) -> None:
    """As in every model, where delta, B and C are made of x: no path is counted twice."""
    generator = torch.Generator().manual_seed(4)
    x, A = torch.randn(2, 5, 3, generator=generator).double(), -torch.rand(3, 2, generator=generator).double()
    B, C = (torch.randn(2, 5, 2, generator=generator).double() for _ in range(2))
    x.requires_grad_()

    def plain(x: Tensor) -> Tensor:
        delta, h, outputs = torch.nn.functional.softplus(x), torch.zeros(2, 3, 2).double(), []
        for t in range(5):
            h = (delta[:, t, :, None] * A).exp() * h + delta[:, t, :, None] * (B * x[..., :1])[:, t, None] * x[
                :, t, :, None
            ]
            outputs.append((h * C[:, t, None]).sum(-1))
        return torch.stack(outputs, 1)

    (expected,) = torch.autograd.grad(plain(x).pow(2).sum(), x)
    y, _ = scan.selective_scan(x, torch.nn.functional.softplus(x), A, B * x[..., :1], C)
    (found,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=create_graph)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
