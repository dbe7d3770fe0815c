"""Any causal language model: what it gives after its unembedding counts, and its parts are found, not listed.

Each number is compared with torch hooks on the untouched Hugging Face model.
"""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from mamba_ioi import circuits
from mamba_ioi.circuits import Circuit, Graph
from mamba_ioi.experiments import greedy_layer_removal, layer_removal
from mamba_ioi.models.model import CausalLM, wrap
from mamba_ioi.tasks.ioi import IOIDataset

from . import plain
from .plain_circuits import PlainRun, hooked_run, nld

TOKENIZER = plain.prompt_tokenizer(plain.NAMES)
V = len(TOKENIZER)
LAYERS = 3
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
}
NO_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GPT = {"vocab_size": V, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
OPT = {
    "vocab_size": V,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "init_std": 0.4,
}
GRANITE = {"logits_scaling": 8.0, "residual_multiplier": 0.3, "embedding_multiplier": 6.0, "attention_multiplier": 0.2}
SSD = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS = {
    # logits scaled or capped after the unembedding
    "granite": lambda: hf.GraniteConfig(**SIZES, **GRANITE),
    "granitemoe": lambda: hf.GraniteMoeConfig(**SIZES, **GRANITE, **MOE),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **SIZES, **SSD, **MOE, logits_scaling=8.0, residual_multiplier=0.3, shared_intermediate_size=16,
        layer_types=["mamba", "attention", "mamba"], mamba_expand=2,
    ),
    "cohere": lambda: hf.CohereConfig(**SIZES, logit_scale=0.06, pad_token_id=0),
    "cohere2": lambda: hf.Cohere2Config(**SIZES, logit_scale=0.06, sliding_window=16, pad_token_id=0),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **SIZES, lru_width=16, head_dim=8, attention_window_size=8, logits_soft_cap=2.0, w_init_variance_scale=0.4
    ),
    "falcon_h1": lambda: hf.FalconH1Config(**SIZES, **SSD, mamba_d_ssm=32, lm_head_multiplier=0.3),
    # blocks, final norms and unembeddings by other names, blocks that return tuples, norms after the blocks or nowhere
    "gpt2": lambda: hf.GPT2Config(**GPT),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**NO_GROUPS),
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16),
    "opt_post_norm": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "phi": lambda: hf.PhiConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "starcoder2": lambda: hf.Starcoder2Config(**SIZES),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, initializer_range=0.4
    ),
    "mpt": lambda: hf.MptConfig(
        vocab_size=V, d_model=16, n_layers=LAYERS, n_heads=2, max_seq_len=32, initializer_range=0.4
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=V, hidden_size=16, n_layer=LAYERS, n_head=2, initializer_range=0.4),
    "biogpt": lambda: hf.BioGptConfig(**NO_GROUPS),
    "rwkv": lambda: hf.RwkvConfig(vocab_size=V, hidden_size=16, num_hidden_layers=LAYERS, context_length=32),
    # other state space models
    "falcon_mamba": lambda: hf.FalconMambaConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=LAYERS, state_size=4, initializer_range=0.4
    ),
    "mamba2": lambda: hf.Mamba2Config(
        vocab_size=V, hidden_size=16, num_hidden_layers=LAYERS, state_size=4, head_dim=8, num_heads=4, n_groups=1,
        chunk_size=4, initializer_range=0.4,
    ),
    "jamba": lambda: hf.JambaConfig(
        **SIZES, num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4,
    ),
    "bamba": lambda: hf.BambaConfig(**SIZES, **SSD, attn_layer_indices=[1], mamba_expand=2),
}  # fmt: skip
AFTER_THE_HEAD = list(CONFIGS)[:9]


def untouched(config) -> nn.Module:
    """The Hugging Face model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(config).eval()


def list_of_blocks(module: nn.Module) -> nn.ModuleList:
    """The blocks: in all of these models the first list of as many modules."""
    return next(part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == LAYERS)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[CausalLM, nn.Module]:
    module = untouched(CONFIGS[request.param]())
    return wrap(module, TOKENIZER, model_id=request.param), module


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 3, seed=3)


def runs(module: nn.Module, data: IOIDataset, cut=()) -> tuple[PlainRun, PlainRun, PlainRun]:
    """The clean and the corrupt run, and the clean one with edges cut."""
    blocks, last = list_of_blocks(module), data.last_position
    clean = hooked_run(module, blocks, None, data.clean_tokens, last)
    corrupt = hooked_run(module, blocks, None, data.corrupt_tokens, last)
    return clean, corrupt, hooked_run(module, blocks, None, data.clean_tokens, last, corrupt, cut)


def test_some_models_scale_or_cap_their_logits() -> None:
    """Without this the tests below would not see where logits are read."""
    for name in AFTER_THE_HEAD:
        module, seen = untouched(CONFIGS[name]()), []
        handle = module.get_output_embeddings().register_forward_hook(
            lambda *hooked, seen=seen: seen.append(hooked[-1])
        )
        with torch.no_grad():
            logits = module(torch.arange(5)[None], use_cache=False).logits
        handle.remove()
        assert (logits - seen[0]).abs().max() > 0.1 * seen[0].abs().max(), name


def test_layer_removal(case: tuple[CausalLM, nn.Module]) -> None:
    model, module = case
    data = IOIDataset.generate(TOKENIZER, 10, seed=4, templates="all")
    table = layer_removal(model, data, progress=False).table.set_index("layer")
    for layer in range(-1, LAYERS):
        logits = plain.without_layers(module, list_of_blocks(module), {layer} - {-1}, data)
        found = table.loc[layer, ["accuracy", "probability"]].tolist()
        assert found == pytest.approx(plain.scores(logits, data), abs=1e-5), layer
    untouched = plain.scores(plain.last_logits(module, data.clean_tokens, data.last_position), data)
    assert table.loc[-1, ["accuracy", "probability"]].tolist() == pytest.approx(untouched, abs=1e-5)


def test_greedy_removal(case: tuple[CausalLM, nn.Module], data: IOIDataset) -> None:
    model, module = case
    table = greedy_layer_removal(model, data, progress=False).table
    removed: set[int] = set()
    for _, row in table.iterrows():
        removed |= {int(row["layer"])} - {-1}
        logits = plain.without_layers(module, list_of_blocks(module), removed, data)
        assert (row["accuracy"], row["probability"]) == pytest.approx(plain.scores(logits, data), abs=1e-5)


def test_circuits(case: tuple[CausalLM, nn.Module], data: IOIDataset) -> None:
    """The whole graph, no edge, one edge and some edges: NLD, KL and logit difference."""
    model, module = case
    edges = Graph(LAYERS).edges()
    for kept in ([], edges, [("embed", "output")], [("embed", "0"), ("0", "2"), ("2", "output")], edges[::2]):
        clean, corrupt, alone = runs(module, data, set(edges) - set(kept))
        found = circuits.evaluate(model, data, Circuit.of(model, kept), absolute=False)
        logs = [run.logits.double().log_softmax(-1) for run in (clean, alone)]
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
        assert found.kl == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
        assert found.nld == pytest.approx(float(nld(alone, clean, corrupt, data, False).mean()), rel=1e-3, abs=1e-4)
        assert found.logit_diff == pytest.approx(sum(plain.differences(alone.logits, data)) / len(data), abs=1e-4)
        if kept == edges:
            expected = plain.last_logits(module, data.clean_tokens, data.last_position)
            torch.testing.assert_close(clean.logits, expected, rtol=1e-4, atol=1e-5)
            assert found.kl < 1e-6 and found.nld == pytest.approx(1, abs=1e-4)


def test_edges_one_by_one(case: tuple[CausalLM, nn.Module], data: IOIDataset) -> None:
    model, module = case
    table = circuits.exact_effects(model, data, absolute=False).table
    for _, row in table.iterrows():
        clean, corrupt, cut = runs(module, data, {(row["src"], row["dst"])})
        assert row["score"] == pytest.approx(
            float(nld(cut, clean, corrupt, data, False).mean()) - 1, rel=1e-3, abs=2e-4
        )
    assert (table["score"].abs() > 1e-3).any()


def test_attribution(case: tuple[CausalLM, nn.Module], data: IOIDataset) -> None:
    """EAP at the clean run against autograd through hooks: (corrupt - clean) of the source by the target's gradient.

    The gradient at a block's input is that of all which follows, less that of the stream which goes past the block.
    """
    model, module = case
    found = circuits.eap(model, data, steps=1, absolute=False).table.set_index(["src", "dst"])["score"]
    blocks, last = list_of_blocks(module), data.last_position
    clean, corrupt, _ = runs(module, data)
    streams: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        streams.append(value.clone().requires_grad_() if not streams else value.clone())
        return streams[-1]

    def whole(_, args, output):
        return (keep(output[0]), *output[1:]) if isinstance(output, tuple) else keep(output)

    handles = [block.register_forward_pre_hook(lambda _, args: (keep(args[0]), *args[1:])) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(whole))
    logits = module(data.clean_tokens, use_cache=False).logits[torch.arange(len(data)), last]
    for handle in handles:
        handle.remove()
    rows = torch.arange(len(data))
    spread = [run.logits[rows, data.answers] - run.logits[rows, data.corrupt_answers] for run in (clean, corrupt)]
    metric = (logits[rows, data.answers] - logits[rows, data.corrupt_answers]) / (spread[0] - spread[1])
    gradients = list(torch.autograd.grad(metric.mean(), streams))
    targets = [one - after for one, after in pairwise(gradients)] + gradients[-1:]
    for (src, dst), score in found.items():
        target = targets[LAYERS if dst == "output" else int(dst)]
        expected = float(((corrupt.values[src] - clean.values[src]) * target).sum())
        assert score == pytest.approx(expected, rel=1e-2, abs=2e-4), (src, dst)
    assert isinstance(found, pd.Series) and (found.abs() > 1e-3).any()
