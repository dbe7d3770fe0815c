"""Plain twins of edge patching, without nnsight: a Mamba computed by hand, and torch hooks on any causal LM.

``cut`` is the set of edges that are resampled, named as in `mamba_ioi.circuits`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from mamba_ioi.tasks.ioi import IOIDataset

from .plain import gated_norm, normed


@dataclass
class PlainRun:
    """What the nodes gave: by name, ``[B, L, ...]``, and the logits at the last positions."""

    values: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


def choose(edge: tuple[str, str], live: Tensor, corrupt: Tensor | None, cut: set, positional: bool) -> Tensor:
    """The live value, or the corrupt one where the edge is cut."""
    if corrupt is None:
        return live
    if not positional:
        return corrupt if edge in cut else live
    value = live.clone()
    for position in range(live.shape[1]):
        if (*edge, position) in cut:
            value[:, position] = corrupt[:, position]
    return value


def parts_of(mixer: nn.Module, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """in_proj's output: the conv's input, the gate, and a Mamba-2's time step."""
    if not hasattr(mixer, "n_groups"):
        return (*projected.chunk(2, dim=-1), None)
    gate, x, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    return x, gate, dt


def scan_of(mixer: nn.Module, inner: Tensor, dt: Tensor | None):
    """The state after a position from the one before it, what is read of a state there, and the first state."""
    n = mixer.ssm_state_size
    A = -mixer.A_log.exp()
    if dt is None:
        delta, B, C = normed(mixer, mixer.x_proj(inner).split([mixer.time_step_rank, n, n], dim=-1))
        delta = F.softplus(mixer.dt_proj(delta))

        def step(h: Tensor, p: int) -> Tensor:
            return (delta[:, p, :, None] * A).exp() * h + delta[:, p, :, None] * B[:, p, None] * inner[:, p, :, None]

        def read(h: Tensor, p: int) -> Tensor:
            return (h * C[:, p, None]).sum(-1) + mixer.D * inner[:, p]

        return step, read, inner.new_zeros(*inner[:, 0].shape, n)
    heads, groups = mixer.num_heads, mixer.n_groups
    x, B, C = inner.split([mixer.intermediate_size, groups * n, groups * n], dim=-1)
    x = x.unflatten(-1, (heads, mixer.head_dim))
    B, C = (value.unflatten(-1, (groups, n)).repeat_interleave(heads // groups, dim=2) for value in (B, C))
    delta = F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)

    def ssd_step(h: Tensor, p: int) -> Tensor:
        came = (delta[:, p, :, None] * x[:, p])[..., None] * B[:, p, :, None]
        return (delta[:, p] * A).exp()[..., None, None] * h + came

    def ssd_read(h: Tensor, p: int) -> Tensor:
        return ((h * C[:, p, :, None]).sum(-1) + mixer.D[:, None] * x[:, p]).flatten(1)

    return ssd_step, ssd_read, x.new_zeros(*x[:, 0].shape, n)


def from_token_to_token(mixer: nn.Module, inner: Tensor, dt: Tensor | None) -> dict[str, Tensor]:
    """``A_bar``, ``write`` and C, ``[B, L, *state]`` each or broadcastable to it, and D x, ``[B, L, E]``."""
    n = mixer.ssm_state_size
    A = -mixer.A_log.exp()
    if dt is None:
        delta, B, C = normed(mixer, mixer.x_proj(inner).split([mixer.time_step_rank, n, n], dim=-1))
        delta = F.softplus(mixer.dt_proj(delta))
        write = delta[..., None] * B[:, :, None] * inner[..., None]
        return {"A_bar": (delta[..., None] * A).exp(), "write": write, "C": C[:, :, None], "D x": mixer.D * inner}
    heads, groups = mixer.num_heads, mixer.n_groups
    x, B, C = inner.split([mixer.intermediate_size, groups * n, groups * n], dim=-1)
    x = x.unflatten(-1, (heads, mixer.head_dim))
    B, C = (value.unflatten(-1, (groups, n)).repeat_interleave(heads // groups, dim=2) for value in (B, C))
    delta = F.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
    write = delta[..., None, None] * x[..., None] * B[:, :, :, None]
    D_x = (mixer.D[:, None] * x).flatten(2)
    return {"A_bar": (delta * A).exp()[..., None, None], "write": write, "C": C[:, :, :, None], "D x": D_x}


def pair_by_pair(name: str, here: dict, there: dict, cut: set) -> Tensor:
    """The scan's output, a term for each pair of positions, with writes and controls of another run where cut."""
    A_bar, C = here["A_bar"].clone(), here["C"].clone()
    length, outputs = C.shape[1], []
    for t in range(length):
        if (f"{name}.controls", f"{name}.ssm", t) in cut:
            A_bar[:, t], C[:, t] = there["A_bar"][:, t], there["C"][:, t]
    for t in range(length):
        y = 0
        for s in range(t + 1):
            carried = (there if (f"{name}.write[{s}]", f"{name}.ssm", t) in cut else here)["write"][:, s]
            for r in range(s + 1, t + 1):
                carried = A_bar[:, r] * carried
            y = y + (C[:, t] * carried).sum(-1)
        outputs.append(y.flatten(1) + here["D x"][:, t])
    return torch.stack(outputs, dim=1)


@torch.no_grad()
def mamba_run(
    module, tokens: Tensor, last: Tensor, corrupt: PlainRun | None = None, cut=(), positional=False, ssm="conv"
) -> PlainRun:
    """A Mamba's forward, position by position, with edges resampled from another run, coarse and fine.

    With ``ssm="states"`` a cut of ``conv -> ssm`` puts the other run's state in place at the position, or at all of
    them, and a cut of ``ssm -> out`` reads the other run's state there. With ``tokens``, writes and controls are cut.
    """
    run, cut = PlainRun(), set(cut)
    n_layers, length = len(module.backbone.layers), tokens.shape[1]
    outside = corrupt.values if corrupt is not None else {}

    def edge(src: str, dst: str, value: Tensor, key: str | None = None) -> Tensor:
        return choose((src, dst), value, outside.get(key or src), cut, positional)

    run.values["embed"] = module.backbone.embeddings(tokens)
    sources = ["embed"]
    for j in range(n_layers + 1):
        name = str(j) if j < n_layers else "output"
        stream = sum(edge(source, name, run.values[source]) for source in sources)
        if j == n_layers:
            break
        block, rows = module.backbone.layers[j], torch.arange(len(tokens))
        mixer = block.mixer
        x, gate, dt = parts_of(mixer, mixer.in_proj(block.norm(stream)))
        conv = mixer.conv1d.bias.expand_as(x).clone()
        for tap, slice_ in enumerate((-3, -2, -1, 0)):
            term = torch.zeros_like(x)
            for p in range(length):
                if p + slice_ >= 0:
                    term[:, p] = mixer.conv1d.weight[:, 0, tap] * x[:, p + slice_]
            run.values[f"{name}.conv[{slice_}]"] = term
            conv = conv + edge(name, f"{name}.conv[{slice_}]", term, f"{name}.conv[{slice_}]")
        run.values[f"{name}.conv"] = conv
        inner = F.silu(edge(f"{name}.conv", f"{name}.ssm", conv) if ssm == "conv" else conv)
        step, read, h = scan_of(mixer, inner, dt)
        outputs, states = [], []
        there = outside.get(f"{name}.h")

        def state(src: str, dst: str, p: int, h: Tensor, there=there) -> Tensor:
            if ssm == "conv" or ((src, dst, p) if positional else (src, dst)) not in cut:
                return h
            return there[:, p]

        for p in range(length):
            h = step(h, p)
            h = state(f"{name}.conv", f"{name}.ssm", p, h)
            states.append(h)
            outputs.append(read(state(f"{name}.ssm", name, p, h), p))
        run.values[f"{name}.ssm"], run.values[f"{name}.skip"] = torch.stack(outputs, dim=1), gate
        run.values[f"{name}.h"] = torch.stack(states, dim=1)
        if ssm == "tokens":
            here = from_token_to_token(mixer, inner, dt)
            run.values |= {f"{name}.{key}": value for key, value in here.items()}
            if corrupt is not None:
                there = {key: outside[f"{name}.{key}"] for key in here}
                run.values[f"{name}.ssm"] = pair_by_pair(name, here, there, cut)
        y = run.values[f"{name}.ssm"]
        y = y if ssm == "states" else edge(f"{name}.ssm", name, y)
        gate = edge(name, f"{name}.skip", gate, f"{name}.skip")
        gate = edge(f"{name}.skip", name, gate)
        run.values[name] = mixer.out_proj(
            gated_norm(mixer.norm, y, gate) if hasattr(mixer, "norm") else y * F.silu(gate)
        )
        sources.append(name)
    run.logits = module.lm_head(module.backbone.norm_f(stream))[rows, last]
    return run


@torch.no_grad()
def hooked_run(
    module: nn.Module,
    blocks,
    norm: nn.Module | None,
    tokens: Tensor,
    last: Tensor,
    corrupt: PlainRun | None = None,
    cut=(),
) -> PlainRun:
    """Any causal language model under torch hooks, with coarse edges resampled from another run.

    The output node is before the final norm; without a norm, after the last block.
    """
    run, cut, names = PlainRun(), set(cut), [str(i) for i in range(len(blocks))]
    outside = corrupt.values if corrupt is not None else {}

    def stream(name: str) -> Tensor:
        return sum(choose((src, name), value, outside.get(src), cut, False) for src, value in run.values.items())

    def before(name: str):
        def hook(_, args):
            if not run.values:
                run.values["embed"] = args[0]
            return (stream(name), *args[1:])

        return hook

    def after(name: str):
        def hook(_, args, output):
            run.values[name] = (output[0] if isinstance(output, tuple) else output) - args[0]
            if norm is None and name == names[-1]:
                return (stream("output"), *output[1:]) if isinstance(output, tuple) else stream("output")

        return hook

    handles = [block.register_forward_pre_hook(before(name)) for block, name in zip(blocks, names, strict=True)]
    handles += [block.register_forward_hook(after(name)) for block, name in zip(blocks, names, strict=True)]
    if norm is not None:
        handles.append(norm.register_forward_pre_hook(lambda _, args: (stream("output"),)))
    try:
        run.logits = module(tokens, use_cache=False).logits[torch.arange(len(tokens)), last]
    finally:
        for handle in handles:
            handle.remove()
    return run


def nld(run: PlainRun, clean: PlainRun, corrupt: PlainRun, data: IOIDataset, absolute: bool = True) -> Tensor:
    """The normalized logit difference of each row, written out."""

    def difference(logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        return logits[rows, data.answers] - logits[rows, data.corrupt_answers]

    low, high = difference(corrupt.logits), difference(clean.logits)
    span = (high - low).abs() if absolute else high - low
    return (difference(run.logits) - low) / span


class Passing(nn.Module):
    """A norm that does nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 0.0

    def forward(self, value: Tensor) -> Tensor:
        return value


def linear_mamba(vocab_size: int, n_layers: int = 3, size: int = 12, seed: int = 0) -> MambaForCausalLM:
    """A Mamba that is an affine function of its embeddings, and still mixes positions by conv and scan.

    Norms do nothing, gates are constant (bias alone), the conv's bias is so large that silu passes everything on, the
    time step is constant, and B and C read one channel that no input reaches. In float64.
    """
    config = MambaConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        num_hidden_layers=n_layers,
        state_size=4,
        use_bias=True,
        tie_word_embeddings=False,
    )
    module = MambaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        module.backbone.norm_f = Passing(size)
        for block in module.backbone.layers:
            mixer, inner = block.mixer, block.mixer.intermediate_size
            block.norm = Passing(size)
            mixer.in_proj.weight[inner:] = 0
            mixer.in_proj.bias[inner:] += 1
            mixer.in_proj.weight[0] = 0
            mixer.conv1d.bias.fill_(40)
            mixer.in_proj.bias[:inner] = 0
            mixer.x_proj.weight[:, 1:] = 0
            mixer.x_proj.weight /= 10
            mixer.out_proj.weight *= 0.1
            mixer.dt_proj.weight.zero_()
            mixer.dt_proj.bias.fill_(-1.0)
            mixer.A_log.fill_(-2.0)
    return module.double()
