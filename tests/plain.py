"""Plain twins of the experiments' parts: torch hooks on the Hugging Face module and a mixer computed by hand.

Nothing here goes through nnsight or through `mamba_ioi`'s sites, patches and sweeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mamba_ioi.tasks.ioi import BOS, OBJECTS, PLACES, TEMPLATES, IOIDataset

Edit = Callable[[Tensor], Tensor]
PATTERN = r"After|wards|F(?=riends)|riends| ?\w+|[.,]"


NAMES = ["Aaron", "Bella", "Carl", "Diana", "Edgar", "Felix", "Oscar", "Paula"]
"""Names for a small tokenizer."""


def prompt_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with exactly the words of the prompts, which aligns the templates as GPT-NeoX's does."""
    words = [BOS, "[UNK]"]
    for template in TEMPLATES:
        words += re.findall(PATTERN, re.sub(r" ?\[\w+\]", "", template))
    words += [f" {word}" for word in (*PLACES, *OBJECTS, *names)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token=BOS)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(module: nn.Module, tokens: Tensor, last: Tensor) -> Tensor:
    """Logits [B, V] of the untouched forward pass, the rows of each length together and cut to it: no padding."""
    parts = {end: module(tokens[last == end, : end + 1], use_cache=False).logits[:, -1] for end in set(last.tolist())}
    logits = torch.empty(len(tokens), next(iter(parts.values())).shape[-1])
    for end, part in parts.items():
        logits[last == end] = part
    return logits


def forward_by_hand(
    module: nn.Module,
    ids: Tensor,
    edits: dict[tuple[str, int | None], Callable] | None = None,
    unlimited: int | None = None,
) -> dict[str, Tensor]:
    """Every site of every layer, computed from the weights by the paper's equations, in the precision of the weights.

    Each value passes through ``edits[site, layer]`` (layer None outside the layers) before anything is made from it:
    a callable of the value, which it must not change in place; of ``h``, a callable of the state and its position.
    From the position ``unlimited`` on, a Mamba-2's time step has no limits, as in transformers' own cached step.
    """
    sizes, edits = module.config, edits or {}
    acts: dict[str, Tensor] = {}

    def site(name: str, layer: int | None, value: Tensor) -> Tensor:
        if (name, layer) in edits and name != "h":
            value = edits[name, layer](value)
        acts[f"hook_{name}" if layer is None else f"blocks.{layer}.hook_{name}"] = value
        return value

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + sizes.layer_norm_epsilon)

    resid = site("embed", None, module.backbone.embeddings(ids))
    mix = partial(ssd_by_hand, unlimited=unlimited) if sizes.model_type == "mamba2" else s6_by_hand
    for i, block in enumerate(module.backbone.layers):
        resid = site("resid_pre", i, resid)
        normal = site("normalized_input", i, norm(site("layer_input", i, resid), block.norm.weight))

        def states(step, h, length, i=i):
            """The states after each position, from what one position makes of the state before it."""
            found = []
            for t in range(length):
                h = step(h, t)
                h = edits["h", i](h, t) if ("h", i) in edits else h
                found.append(h)
            return site("h", i, torch.stack(found, 1))

        gated = mix(block.mixer, normal, lambda name, value, i=i: site(name, i, value), states)
        added = site("out_proj", i, site("after_skip", i, gated) @ block.mixer.out_proj.weight.T)
        resid = site("resid_post", i, resid + added)
    final = site("norm", None, norm(resid, module.backbone.norm_f.weight))
    site("logits", None, final @ module.lm_head.weight.T)
    return acts


def conv_by_hand(mixer: nn.Module, in_proj: Tensor, site: Callable) -> Tensor:
    """The conv's output after silu."""
    weight = mixer.conv1d.weight[:, 0]
    taps = weight.shape[-1]
    shifted = [F.pad(in_proj, (0, 0, k, 0))[:, : in_proj.shape[1]] for k in reversed(range(taps))]
    terms = site("conv_slice", torch.stack([shifted[k] * weight[:, k] for k in range(taps)], -1))
    conv = site("conv", terms.sum(-1) if mixer.conv1d.bias is None else terms.sum(-1) + mixer.conv1d.bias)
    return conv * torch.sigmoid(conv)


def s6_by_hand(mixer: nn.Module, normal: Tensor, site: Callable, states: Callable) -> Tensor:
    """What out_proj receives in a Mamba (arXiv 2312.00752): ``site`` takes every value by name."""
    E, N = mixer.A_log.shape
    in_proj, gate = (normal @ mixer.in_proj.weight.T).split(E, -1)
    in_proj, gate = site("in_proj", in_proj), site("skip", gate)
    x = site("ssm_input", conv_by_hand(mixer, in_proj, site))
    split = normed(mixer, (x @ mixer.x_proj.weight.T).split([mixer.time_step_rank, N, N], -1))
    delta_1, B, C = (site(name, value) for name, value in zip(("delta_1", "B", "C"), split, strict=True))
    A = site("A", -torch.exp(mixer.A_log))
    delta_2 = site("delta_2", delta_1 @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    delta = site("delta", torch.log1p(torch.exp(delta_2)))
    A_bar = site("A_bar", torch.exp(torch.einsum("ble,en->blen", delta, A)))
    B_bar = site("B_bar", torch.einsum("ble,bln->blen", delta, B))
    write = site("write", torch.einsum("blen,ble->blen", B_bar, x))
    start = site("h_start", x.new_zeros(x.shape[0], E, N))
    h = states(lambda h, t: A_bar[:, t] * h + write[:, t], start, x.shape[1])
    y = site("y", torch.einsum("blen,bln->ble", h, C))
    return site("ssm_output", y + mixer.D * x) * gate * torch.sigmoid(gate)


def ssd_by_hand(
    mixer: nn.Module, normal: Tensor, site: Callable, states: Callable, unlimited: int | None = None
) -> Tensor:
    """What out_proj receives in a Mamba-2 (arXiv 2405.21060): head i reads B and C of group i // (H / G)."""
    (H,), P, G, N = mixer.A_log.shape, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    projected = F.linear(normal * getattr(mixer, "ssm_in_multiplier", 1.0), mixer.in_proj.weight, mixer.in_proj.bias)
    projected = projected * getattr(mixer, "mup_vector", 1.0)
    gate, in_proj, dt = projected.split([H * P, H * P + 2 * G * N, H], -1)
    in_proj, gate = site("in_proj", in_proj), site("skip", gate)
    x, B, C = conv_by_hand(mixer, in_proj, site).split([H * P, G * N, G * N], -1)
    x = site("ssm_input", x)
    B, C = (site(name, value.unflatten(-1, (G, N))) for name, value in (("B", B), ("C", C)))
    A = site("A", -torch.exp(mixer.A_log))
    delta_2 = site("delta_2", dt + mixer.dt_bias)
    low, high = mixer.time_step_limit
    free = torch.arange(delta_2.shape[1])[:, None] >= (delta_2.shape[1] if unlimited is None else unlimited)
    delta = torch.log1p(torch.exp(delta_2))
    delta = site("delta", torch.where(free, delta, delta.clamp(low, high)))
    A_bar = site("A_bar", torch.exp(delta * A))
    group = torch.arange(H) // (H // G)
    B_bar = site("B_bar", delta[..., None] * B[:, :, group])
    heads = x.unflatten(-1, (H, P))
    write = site("write", torch.einsum("blhp,blhn->blhpn", heads, B_bar))
    start = site("h_start", x.new_zeros(x.shape[0], H, P, N))
    h = states(lambda h, t: A_bar[:, t, :, None, None] * h + write[:, t], start, x.shape[1])
    y = site("y", torch.einsum("blhpn,blhn->blhp", h, C[:, :, group]).flatten(2))
    return gated_norm(mixer.norm, site("ssm_output", y + (mixer.D[:, None] * heads).flatten(2)), gate)


def gated_norm(norm: nn.Module, y: Tensor, gate: Tensor) -> Tensor:
    """The gate and the norm after the scan: over all channels or each group of them, before the gate or after it."""
    gate = gate * torch.sigmoid(gate)
    if isinstance(norm, nn.Identity):
        return y * gate
    first = getattr(norm, "norm_before_gate", False)
    y = y if first else y * gate
    size = getattr(norm, "group_size", y.shape[-1] // getattr(norm, "n_groups", 1))
    groups = y.unflatten(-1, (-1, size))
    y = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)).flatten(-2) * norm.weight
    return y * gate if first else y


def normed(mixer: nn.Module, parts) -> list[Tensor]:
    """x_proj's three outputs as the scan uses them: in Falcon-Mamba and Jamba each over the root of its mean square."""
    if type(mixer).__name__ == "JambaMambaMixer":
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        return [
            norm.weight * part / (part.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            for norm, part in zip(norms, parts, strict=True)
        ]
    if mixer.config.model_type != "falcon_mamba":
        return list(parts)
    return [part / (part.pow(2).mean(-1, keepdim=True) + mixer.config.mixer_rms_eps).sqrt() for part in parts]


@torch.no_grad()
def mixer_by_hand(mixer: nn.Module, hidden: Tensor, edits: dict[str, Edit]) -> Tensor:
    """A mixer's output, from the weights, with values passed through ``edits`` by site.

    ``h`` gets the state and is called as ``edits["h"](state, t)``.
    """

    def site(name: str, value: Tensor) -> Tensor:
        return edits[name](value) if name in edits else value

    def states(step, h: Tensor, length: int) -> Tensor:
        found = []
        for t in range(length):
            h = step(h, t)
            h = edits["h"](h, t) if "h" in edits else h
            found.append(h)
        return torch.stack(found, 1)

    mix = ssd_by_hand if mixer.A_log.dim() == 1 else s6_by_hand
    return mixer.out_proj(mix(mixer, hidden, site, states))


def parts_of_in_proj(mixer: nn.Module, output: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """What in_proj gives, in parts, and which of them the conv takes."""
    if mixer.A_log.dim() > 1:
        return output.chunk(2, dim=-1), 0
    return output.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1), 1


@contextmanager
def edited(module: PreTrainedModel, edits: dict[tuple[str, int], Edit]) -> Iterator[None]:
    """While open, the module's values pass through ``edits``, by (site, layer)."""
    handles = []
    by_hand: dict[int, dict[str, Edit]] = {}
    for (site, layer), edit in edits.items():
        block = module.backbone.layers[layer]
        if site == "layer_input":
            handles.append(block.norm.register_forward_pre_hook(lambda _, args, edit=edit: (edit(args[0]),)))
        elif site == "in_proj":

            def conv_input(_, args, output, edit=edit, mixer=block.mixer):
                parts, which = parts_of_in_proj(mixer, output)
                return torch.cat([edit(part) if i == which else part for i, part in enumerate(parts)], dim=-1)

            handles.append(block.mixer.in_proj.register_forward_hook(conv_input))
        elif site == "out_proj":
            handles.append(block.mixer.out_proj.register_forward_hook(lambda _, args, output, edit=edit: edit(output)))
        else:
            by_hand.setdefault(layer, {})[site] = edit
    for layer, sites in by_hand.items():
        mixer = module.backbone.layers[layer].mixer
        handles.append(
            mixer.register_forward_hook(lambda mixer, args, output, sites=sites: mixer_by_hand(mixer, args[0], sites))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def values(module: PreTrainedModel, tokens: Tensor, site: str, layer: int) -> Tensor:
    """The site's value, [B, L, ...]; ``h`` stacked over positions."""
    found: list[Tensor] = []

    def keep(value: Tensor, t: int | None = None) -> Tensor:
        found.append(value.clone())
        return value

    with edited(module, {(site, layer): keep}):
        module(tokens, use_cache=False)
    return torch.stack(found, dim=1) if site == "h" else found[0]


def resampled(
    module: PreTrainedModel, data: IOIDataset, site: str, layer: int, position: int | None, tap: int | None = None
) -> Tensor:
    """Logits [B, V] of the clean prompts with the site's value taken from the corrupt prompts."""
    corrupt = values(module, data.corrupt_tokens, site, layer)

    def put(value: Tensor, t: int | None = None) -> Tensor:
        value = value.clone()
        if site == "h":
            return corrupt[:, t].clone() if t == position else value
        where = (slice(None), slice(None) if position is None else position)
        where = where if tap is None else (*where, slice(None), tap)
        value[where] = corrupt[where]
        return value

    with edited(module, {(site, layer): put}), torch.no_grad():
        logits = module(data.clean_tokens, use_cache=False).logits
    return logits[torch.arange(len(data)), data.last_position]


# ---------------------------------------------------------------------------------------------------------------------
# Scores, row by row
# ---------------------------------------------------------------------------------------------------------------------


def differences(logits: Tensor, data: IOIDataset) -> list[float]:
    """Each row's logit of the answer less that of the corrupt answer."""
    answers = zip(data.answers.tolist(), data.corrupt_answers.tolist(), strict=True)
    return [float(row[one] - row[other]) for row, (one, other) in zip(logits, answers, strict=True)]


def effects(module: PreTrainedModel, data: IOIDataset, patched: Tensor) -> Tensor:
    """1 - NLD of each row."""
    clean = differences(last_logits(module, data.clean_tokens, data.last_position), data)
    corrupt = differences(last_logits(module, data.corrupt_tokens, data.last_position), data)
    rows = zip(differences(patched, data), clean, corrupt, strict=True)
    return torch.tensor([1 - (p - low) / (high - low) for p, high, low in rows])


def scores(logits: Tensor, data: IOIDataset) -> tuple[float, float]:
    """Mean accuracy, and mean probability of the answer among the names of the pair."""
    right, probability = 0, 0.0
    for row, answer, names in zip(logits, data.answers.tolist(), data.candidates.tolist(), strict=True):
        names = [name for name in names if name >= 0]
        right += max(names, key=lambda name: row[name]) == answer
        probability += float(row[names].softmax(0)[names.index(answer)])
    return right / len(data), probability / len(data)


def without_layers(module: nn.Module, blocks: nn.ModuleList, removed: set[int], data: IOIDataset) -> Tensor:
    """Logits [B, V] with blocks that give their input as their output."""

    def identity(_, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [blocks[i].register_forward_hook(identity, with_kwargs=True) for i in removed]
    try:
        return last_logits(module, data.clean_tokens, data.last_position)
    finally:
        for handle in handles:
            handle.remove()
