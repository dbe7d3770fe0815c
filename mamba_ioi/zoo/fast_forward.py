"""A faster forward pass of transformers' Mamba for training on a CPU: the same function of the same parameters.

transformers' own scan keeps every intermediate of its Python loop for autograd. Here the loop has its own backward pass
(the adjoint recurrence), which makes a training step about three times faster at the sizes of the embedded models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer


class _Scan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t,  y_t = h_t C_t  (Mamba, arXiv 2312.00752, eq. 2)."""

    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """u = delta x [L, B, E], delta [L, B, E], A [E, N], B and C [L, B, N] -> y [L, B, E]."""
        decay = torch.exp(delta.unsqueeze(-1) * A)
        states = torch.empty_like(decay)
        for t in range(u.shape[0]):
            torch.mul(u[t].unsqueeze(-1), B[t].unsqueeze(1), out=states[t])
            if t:
                states[t].addcmul_(decay[t], states[t - 1])
        ctx.save_for_backward(u, delta, A, B, C, decay, states)
        return (states @ C.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        """The adjoint recurrence g_t = grad_y_t C_t + exp(delta_{t+1} A) g_{t+1}, and the gradients it gives."""
        u, delta, A, B, C, decay, states = ctx.saved_tensors
        grad_C = (grad_y.unsqueeze(-2) @ states).squeeze(-2)
        grad_u, grad_delta, grad_B = torch.empty_like(u), torch.zeros_like(delta), torch.empty_like(B)
        grad_A = torch.zeros_like(A)
        grad_h = torch.zeros_like(states[0])
        for t in range(u.shape[0] - 1, -1, -1):
            grad_h.addcmul_(grad_y[t].unsqueeze(-1), C[t].unsqueeze(1))
            grad_u[t] = torch.bmm(grad_h, B[t].unsqueeze(-1)).squeeze(-1)
            grad_B[t] = torch.bmm(u[t].unsqueeze(1), grad_h).squeeze(1)
            if t:
                grad_h *= decay[t]
                grad_log_decay = grad_h * states[t - 1]
                grad_delta[t] = torch.einsum("ben,en->be", grad_log_decay, A)
                grad_A += torch.einsum("ben,be->en", grad_log_decay, delta[t])
        return grad_u, grad_delta, grad_A, grad_B, grad_C


def _mix(mixer: MambaMixer, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
    """One mixer (gated convolution, selective scan, output projection), without a cache or a mask."""
    length = hidden.shape[1]
    conv, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    padded = F.pad(conv, (0, 0, mixer.conv_kernel_size - 1, 0))
    taps = mixer.conv1d.weight.squeeze(1)
    terms = (padded[:, k : k + length] * taps[:, k] for k in range(mixer.conv_kernel_size))
    x = sum(terms, start=torch.tensor(0.0))
    x = F.silu(x if mixer.conv1d.bias is None else x + mixer.conv1d.bias)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    delta, B, C = mixer.x_proj(x).split(sizes, dim=-1)
    delta = F.softplus(mixer.dt_proj(delta))
    u, delta_t, B, C = ((z.transpose(0, 1).contiguous()) for z in (delta * x, delta, B, C))
    y = _Scan.apply(u, delta_t, -torch.exp(mixer.A_log), B, C).transpose(0, 1)
    return mixer.out_proj((y + x * mixer.D) * F.silu(gate))


def fast_logits(model: MambaForCausalLM, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    """The logits of a float32 model, equal to `model(tokens).logits`, with gradients for its parameters."""
    hidden = model.backbone.embeddings(tokens)
    for block in model.backbone.layers:
        assert isinstance(block, MambaBlock)
        hidden = hidden + _mix(block.mixer, block.norm(hidden))
    return model.lm_head(model.backbone.norm_f(hidden))
