"""Hybrids of random weights, small enough to be run by hand: one of each family, and of some two or three kinds."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from mamba_ioi import PromptPairs
from mamba_ioi.models.model import MambaModel, wrap

V = 61
BASE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "num_key_value_heads": 1}
HEADS = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 3,
    "time_step_limit": (0.4, 1.5),
}
EXPERTS = {"num_experts_per_tok": 1}
GRANITE = {
    "shared_intermediate_size": 24,
    "layer_types": ["mamba", "attention", "mamba"],
    "residual_multiplier": 0.7,
    "embedding_multiplier": 1.3,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.4,
    "position_embedding_type": None,
}
FALCON = {
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.8,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 1.2,
    "embedding_multiplier": 1.4,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 0.9,
    "mlp_multipliers": [0.9, 1.1],
}


def falcon(**more) -> PreTrainedModel:
    return FalconH1ForCausalLM(FalconH1Config(**BASE | MAMBA | HEADS | FALCON | more, num_hidden_layers=3))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **BASE | MAMBA | EXPERTS,
            num_hidden_layers=4,
            mamba_dt_rank=3,
            attn_layer_period=4,
            attn_layer_offset=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
        )
    ),
    "bamba": lambda: BambaForCausalLM(BambaConfig(**BASE | MAMBA | HEADS, num_hidden_layers=3, attn_layer_indices=[1])),
    "granitemoehybrid": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**BASE | MAMBA | HEADS | EXPERTS | GRANITE, num_hidden_layers=3, num_local_experts=2)
    ),
    "granitemoehybrid dense": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**BASE | MAMBA | HEADS | GRANITE, num_hidden_layers=3, num_local_experts=0)
    ),
    "nemotron_h": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            **BASE,
            num_hidden_layers=4,
            layers_block_type=["mamba", "attention", "mamba", "mlp"],
            num_key_value_heads=1,
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=2,
            ssm_state_size=4,
            conv_kernel=4,
            chunk_size=3,
            time_step_min=0.3,
        )
    ),
    "zamba2": lambda: Zamba2ForCausalLM(
        Zamba2Config(
            **BASE,
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            n_mamba_heads=4,
            mamba_ngroups=2,
            mamba_d_state=4,
            mamba_d_conv=4,
            mamba_expand=2,
            chunk_size=3,
            num_mem_blocks=1,
            adapter_rank=4,
            time_step_min=0.3,
        )
    ),
    "falcon_h1": lambda: falcon(mamba_rms_norm=True),
    "falcon_h1 norm first": lambda: falcon(mamba_rms_norm=True, mamba_norm_before_gate=True),
    "falcon_h1 no norm": lambda: falcon(mamba_rms_norm=False),
}
KINDS = {
    "jamba": ["mamba+mlp", "mamba+moe", "attention+mlp", "mamba+moe"],
    "bamba": ["mamba2+mlp", "attention+mlp", "mamba2+mlp"],
    "granitemoehybrid": ["mamba2+moe", "attention+moe", "mamba2+moe"],
    "granitemoehybrid dense": ["mamba2+mlp", "attention+mlp", "mamba2+mlp"],
    "nemotron_h": ["mamba2", "attention", "mamba2", "mlp"],
    "zamba2": ["mamba2", "attention+mlp+mamba2"] * 2,
    **dict.fromkeys(("falcon_h1", "falcon_h1 norm first", "falcon_h1 no norm"), ["mamba2+attention+mlp"] * 3),
}


def build(family: str) -> PreTrainedModel:
    """Random weights, large enough to matter; x_proj's are small, so that norms after it, and their epsilon, matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = FAMILIES[family]().eval()
    generator = torch.Generator().manual_seed(zlib.crc32(family.encode()))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.05 if "x_proj" in name else 0.3 if parameter.dim() > 1 else 0.2
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


MODELS: dict[str, MambaModel] = {family: wrap(build(family), None, model_id=family) for family in FAMILIES}
IDS = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(1))
EXACT: dict[str, PreTrainedModel] = {}


def exact(model: MambaModel) -> PreTrainedModel:
    """The same weights in float64."""
    if model.model_id not in EXACT:
        EXACT[model.model_id] = copy.deepcopy(model._module).double()
        EXACT[model.model_id].config._experts_implementation = "eager"  # which alone knows float64
    return EXACT[model.model_id]


def close(value: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(value.double(), expected.double(), rtol=2e-4, atol=1e-4 * scale + 1e-7)


def scan_layers(model: MambaModel) -> list[int]:
    """The layers that have a scan."""
    return [i for i, kind in enumerate(model.layer_kinds) if "mamba" in kind.split("+") or "mamba2" in kind.split("+")]


def short_pairs() -> PromptPairs:
    """Three pairs that part at one token, with answers that mean nothing."""
    clean, corrupt = IDS.clone(), IDS.clone()
    corrupt[:, 2] = (clean[:, 2] + 7) % V
    answers = torch.tensor([5, 11, 17])
    return PromptPairs(clean_tokens=clean, corrupt_tokens=corrupt, answers=answers, corrupt_answers=answers + 20)


def differences(logits: Tensor, pairs: PromptPairs) -> Tensor:
    rows = torch.arange(len(pairs))
    return logits[rows, -1, pairs.answers] - logits[rows, -1, pairs.corrupt_answers]
