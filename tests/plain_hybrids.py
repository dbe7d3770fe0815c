"""Hybrids without nnsight: torch hooks on the Hugging Face module, and each mixer computed by hand from its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .plain import s6_by_hand, ssd_by_hand

MIXERS = ("mamba", "mamba_decoder.mamba", "mixer")
NORMS = {"mamba": "input_layernorm", "mamba_decoder.mamba": "mamba_decoder.input_layernorm", "mixer": "norm"}


def find(block: nn.Module, path: str) -> nn.Module | None:
    """A part of a block by its path; None if it has none."""
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


def mixer_of(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The path and the module of a block's scan; None if it has none."""
    found = [(path, find(block, path)) for path in MIXERS]
    return next(((path, part) for path, part in found if part is not None and hasattr(part, "A_log")), None)


@torch.no_grad()
def run_by_hand(
    module: nn.Module, ids: Tensor, edits: dict[tuple[str, int], Callable] | None = None
) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """Every site of every layer by (name, layer), and the logits ``[B, L, V]``.

    Each value passes through ``edits[site, layer]``, a callable of the value; of ``h``, of the state and its position.
    """
    edits, acts, handles = edits or {}, {}, []

    def site(name: str, i: int, value: Tensor) -> Tensor:
        if (name, i) in edits and name != "h":
            value = edits[name, i](value)
        acts[name, i] = value
        return value

    def first(args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def given(args: tuple, kwargs: dict, value: Tensor) -> tuple[tuple, dict]:
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    def before(part: nn.Module, work: Callable[[Tensor], Tensor]) -> None:
        def hook(_, args, kwargs):
            return given(args, kwargs, work(first(args, kwargs)))

        handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))

    def after(part: nn.Module, work: Callable[[Tensor], Tensor]) -> None:
        def hook(_, args, output):
            return (work(output[0]), *output[1:]) if isinstance(output, tuple) else work(output)

        handles.append(part.register_forward_hook(hook))

    def given_beside(block: nn.Module, work: Callable[[Tensor], Tensor]) -> None:
        """What a Zamba2's shared block reads of the embeddings."""
        handles.append(block.register_forward_pre_hook(lambda _, args: (args[0], work(args[1]), *args[2:])))

    for i, block in enumerate(module.model.layers):
        found, attn = mixer_of(block), find(block, "self_attn")
        scale = getattr(block, "residual_multiplier", 1.0)
        parallel = found is not None and attn is not None
        streams: dict[str, Tensor] = {}
        before(block, lambda value, i=i: site("resid_pre", i, value))
        if hasattr(block, "mamba_decoder"):
            given_beside(block, lambda value, i=i: site("beside", i, value))
        if found is not None:
            path, mixer = found
            norm = find(block, NORMS[path])

            def mixed(_, args, kwargs, output, i=i, mixer=mixer, block=block, parallel=parallel, scale=scale):
                normal = first(args, kwargs)
                if parallel:
                    normal = block.input_layernorm.forward(site("layer_input", i, streams_of[i]["stream"]))
                normal = site("normalized_input", i, normal)

                def states(step, h, length):
                    kept = []
                    for t in range(length):
                        h = step(h, t)
                        h = edits["h", i](h, t) if ("h", i) in edits else h
                        kept.append(h)
                    return site("h", i, torch.stack(kept, 1))

                mix = ssd_by_hand if mixer.A_log.dim() == 1 else s6_by_hand
                gated = mix(mixer, normal, lambda name, value: site(name, i, value), states)
                added = nn.functional.linear(site("after_skip", i, gated), mixer.out_proj.weight, mixer.out_proj.bias)
                scale = scale * getattr(block, "ssm_out_multiplier", 1.0)
                return site("out_proj", i, added * scale) / scale

            handles.append(mixer.register_forward_hook(mixed, with_kwargs=True))
            if parallel:
                before(block.input_layernorm, lambda value, s=streams: s.setdefault("stream", value))
            else:
                before(norm, lambda value, i=i: site("layer_input", i, value))
        if attn is not None or getattr(block, "block_type", "") == "full_attention":
            part = attn if attn is not None else block.mixer
            factor = scale * getattr(block, "attn_out_multiplier", 1.0)
            if parallel:

                def attention(_, i=i, block=block, streams=streams):
                    stream = site("attn_in", i, streams["stream"])
                    return block.input_layernorm.forward(stream) * block.attention_in_multiplier

                before(part, attention)
            else:
                before(find(block, "input_layernorm") or block.norm, lambda value, i=i: site("attn_in", i, value))
            after(part, lambda value, i=i, factor=factor: site("attn_out", i, value * factor) / factor)
        mlp = find(block, "feed_forward") or find(block, "shared_mlp")
        if mlp is None and getattr(block, "block_type", "") in ("mlp", "moe"):
            mlp = block.mixer
        if mlp is not None:
            norm = find(block, "pre_ff_layernorm") or find(block, "post_attention_layernorm") or block.norm
            before(norm, lambda value, i=i: site("mlp_in", i, value))
            experts = find(block, "block_sparse_moe")
            beside = {"value": torch.zeros((), dtype=torch.float64)}
            if experts is not None:
                after(experts, lambda value, b=beside: b.__setitem__("value", value) or value)

            def whole(value, i=i, scale=scale, beside=beside):
                return site("mlp_out", i, (value + beside["value"]) * scale) / scale - beside["value"]

            after(mlp, whole)
        after(block, lambda value, i=i: site("resid_post", i, value))
        streams_of[i] = streams
    try:
        logits = module(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
        streams_of.clear()
    return acts, logits


streams_of: dict[int, dict[str, Tensor]] = {}


def cut_by_hand(acts: dict, there: dict | None, layer: int, sources: list[int], target: int) -> Tensor:
    """The y at the target without what the sources write there, or with what they write in the other run."""
    A_bar, write, C = (acts[name, layer] for name in ("A_bar", "write", "C"))
    y = acts["y", layer][:, target].clone()
    for source in sources:
        flow = (0.0 if there is None else there["write", layer][:, source]) - write[:, source]
        for t in range(source + 1, target + 1):
            flow = A_bar[:, t].view(*A_bar[:, t].shape, *[1] * (flow.dim() + 1 - A_bar.dim())) * flow
        read = C[:, target] if flow.dim() == 3 else C[:, target].repeat_interleave(flow.shape[1] // C.shape[2], dim=1)
        y += (flow * (read[:, None] if flow.dim() == 3 else read[:, :, None])).sum(-1).flatten(1)
    return y
