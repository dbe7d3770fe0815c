"""Attention from token to token, of transformers and hybrids, against patterns that Hugging Face gives, and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mamba_ioi import cache, hidden_attention, load_model, token_contributions
from mamba_ioi.models.model import wrap

from .hybrid_models import build

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=2, n_positions=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=8, sliding_window=3, attn_logit_softcapping=0.5, query_pre_attn_scalar=1)
    ),
}
LAYERS = dict.fromkeys(PLAIN, 1) | {"gemma2": 0}  # of Gemma 2 one that sees a window
LAYERS |= {"jamba": 2, "bamba": 1, "granitemoehybrid": 1, "nemotron_h": 1, "falcon_h1": 1}
IDS = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def made(family: str):
    """A random model, with attention that is far from even."""
    if family not in PLAIN:
        return build(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = PLAIN[family]().eval()
        for name, parameter in module.named_parameters():
            if name.endswith(("weight", "bias")) and "norm" not in name and "ln_" not in name:
                parameter.data = torch.randn_like(parameter) * 0.4
    module.requires_grad_(False)
    return module


MODULES = {family: made(family) for family in LAYERS}


@pytest.fixture(params=LAYERS)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return wrap(copy.deepcopy(MODULES[family]), None, model_id=family)


def patterns(family: str, ids: Tensor = IDS) -> Tensor:
    """The pattern [B, H, L, L] that Hugging Face gives itself, computed eagerly."""
    module = copy.deepcopy(MODULES[family])
    module.set_attn_implementation("eager")
    with torch.no_grad():
        given = module(ids, output_attentions=True, use_cache=False).attentions
    given = [one for one in given if one is not None]  # of hybrids, of layers with an attention
    index = LAYERS[family] if len(given) == module.config.num_hidden_layers else 0
    return given[index]


def test_the_pattern(family, model):
    expected, layer = patterns(family), LAYERS[family]
    found = hidden_attention(model, IDS, layer, reduce=None, part="attention")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found.sum(-1) - 1).abs().max() < 1e-5 and not found.triu(1).any()
    assert (found[:, :, -1].amax(-1) > 0.3).any()
    mean = hidden_attention(model, IDS, layer, part="attention")
    torch.testing.assert_close(mean, expected.mean(1), rtol=1e-5, atol=1e-6)
    own = torch.tensor([[8, 3], [0, 5], [7, 7]])
    some = hidden_attention(model, IDS, layer, reduce=None, units=[1], targets=own, part="attention")
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(some[:, 0], expected[:, 1][rows, own], rtol=1e-5, atol=1e-6)


def test_contributions_add_up(family, model):
    """To what the attention adds to the stream, as a hook of the block sees it."""
    layer = LAYERS[family]
    found = token_contributions(model, IDS, layer, part="attention")
    added = cache(model, IDS, [("attn_out", layer)])["attn_out", layer]
    assert found.shape == (3, 9, 9, 16) and added.abs().max() > 1e-2
    torch.testing.assert_close(found.sum(2), added, rtol=1e-4, atol=1e-5)
    assert not found[:, torch.ones(9, 9).triu(1).bool()].any()
    last = token_contributions(model, IDS, layer, targets=-1, part="attention")
    torch.testing.assert_close(last, found[:, -1:], rtol=1e-5, atol=1e-6)
    model.memory = 1
    torch.testing.assert_close(token_contributions(model, IDS, layer, part="attention"), found, rtol=1e-4, atol=1e-5)


def test_each_by_hand():
    """GPT-NeoX in float64: every source alone, values and output projection by the layer's own weights."""
    module, layer = copy.deepcopy(MODULES["gpt_neox"]).double(), LAYERS["gpt_neox"]
    attention, seen = module.gpt_neox.layers[layer].attention, []
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        module(IDS)
    hook.remove()
    qkv = attention.query_key_value(seen[0]).view(3, 9, 2, 24)
    values, pattern = qkv[..., 16:], patterns("gpt_neox").double()
    expected = torch.zeros(3, 9, 9, 16, dtype=torch.float64)
    for t in range(9):
        for s in range(t + 1):
            mixed = pattern[:, :, t, s, None] * values[:, s]
            expected[:, t, s] = mixed.flatten(1) @ attention.dense.weight.T
        expected[:, t, t] += attention.dense.bias
    assert attention.dense.bias.abs().max() > 0.1
    model = wrap(copy.deepcopy(MODULES["gpt_neox"]).double(), None, model_id="exact")
    torch.testing.assert_close(token_contributions(model, IDS, layer, part="attention"), expected, rtol=1e-5, atol=1e-5)


def test_half_precision(family):
    module = copy.deepcopy(MODULES[family]).to(torch.bfloat16)
    found = hidden_attention(wrap(module, None, model_id=family), IDS, LAYERS[family], part="attention")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 9), rtol=0, atol=2e-2)


def test_refused():
    hybrid, plain, tiny = (wrap(MODULES[name], None, model_id=name) for name in ("bamba", "llama", "gpt2"))
    mamba = load_model("tiny")
    bloom = wrap(BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2)), None, model_id="b")
    for function in (hidden_attention, token_contributions):
        for model, layer, part, sentence in (
            (hybrid, 0, "attention", "layer 0 of bamba has no attention .* it is mamba2"),
            (mamba, 0, "attention", "layer 0 of tiny has no attention"),
            (hybrid, 1, "scan", "layer 1 of bamba has no scan; give part='attention'"),
            (plain, 1, "scan", "has no scan; give part='attention'"),
            (tiny, 3, "attention", "needs a layer from 0 to 2, not 3"),
            (plain, 1, "mlp", "part is 'scan' or 'attention', not 'mlp'"),
            (bloom, 0, "attention", "does not call transformers' attention function"),
        ):
            with pytest.raises(ValueError, match=sentence):
                function(model, IDS, layer, part=part)
    with pytest.raises(ValueError, match="units of layer 1 are 0 to 3"):
        hidden_attention(plain, IDS, 1, units=[4], part="attention")
