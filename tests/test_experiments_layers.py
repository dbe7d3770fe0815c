"""Layer removal on Mamba, GPT-2, Llama and GPT-J against forward hooks on prompts without padding."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig

from mamba_ioi.experiments import greedy_layer_removal, layer_removal, resample_ablation
from mamba_ioi.models.model import CausalLM, wrap
from mamba_ioi.result import bootstrap_interval
from mamba_ioi.tasks.ioi import IOIDataset

from . import plain
from .conftest import RANDOM
from .plain import NAMES

TOKENIZER = plain.prompt_tokenizer(NAMES)
LAYERS = 3


def module_of(kind: str) -> nn.Module:
    """A small random model of the kind, with weights large enough for every layer to matter."""
    V = len(TOKENIZER)
    if kind in RANDOM:
        return RANDOM[kind](seed=1, vocab_size=V, num_hidden_layers=LAYERS)
    configs = {
        "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, initializer_range=0.5),
        "llama": LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
        ),
        "gptj": GPTJConfig(
            vocab_size=V, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, rotary_dim=4, initializer_range=0.5
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configs[kind]).eval()


@pytest.fixture(scope="module", params=[*RANDOM, "gpt2", "llama", "gptj"])
def case(request: pytest.FixtureRequest) -> tuple[CausalLM, nn.ModuleList, IOIDataset]:
    module = module_of(request.param)
    blocks = next(m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    data = IOIDataset.generate(TOKENIZER, 35, seed=3, templates="all")
    assert len(set(data.last_position.tolist())) == 2, "rows of two lengths: the shorter are padded on the right"
    return wrap(module, TOKENIZER, model_id=request.param), blocks, data


def test_layer_removal_equals_hooks(case) -> None:
    model, blocks, data = case
    table = layer_removal(model, data, progress=False).table
    assert table["layer"].tolist() == [-1, *range(LAYERS)]
    for _, row in table.iterrows():
        removed = set() if row["layer"] < 0 else {int(row["layer"])}
        logits = plain.without_layers(model._module, blocks, removed, data)
        assert (row["accuracy"], row["probability"]) == pytest.approx(plain.scores(logits, data), abs=1e-4)
        each = [plain.scores(logits[i : i + 1], data[i]) for i in range(len(data))]
        for column, low, high in ((0, "accuracy_low", "accuracy_high"), (1, "low", "high")):
            expected = bootstrap_interval([scores[column] for scores in each])
            assert (row[low], row[high]) == pytest.approx(tuple(map(float, expected)), abs=1e-4)
    assert table["n"].tolist() == [70] * (LAYERS + 1)
    assert table["probability"].nunique() == LAYERS + 1, "every layer does something"


def test_batches_change_nothing(case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, data = case
    whole = layer_removal(model, data, progress=False).table
    module = importlib.import_module("mamba_ioi.experiments.layer_removal")
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 30)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 60)
    table = layer_removal(model, data, progress=False).table
    assert table["accuracy"].tolist() == whole["accuracy"].tolist()
    assert table["probability"].tolist() == pytest.approx(whole["probability"].tolist(), abs=1e-5)


def test_greedy_removal_equals_trying_everything(case) -> None:
    model, blocks, data = case
    result = greedy_layer_removal(model, data, progress=False)
    removed: list[int] = []
    expected = [(-1, *plain.scores(plain.without_layers(model._module, blocks, set(), data), data))]
    while len(removed) < LAYERS:
        left = [layer for layer in range(LAYERS) if layer not in removed]
        tried = {
            layer: plain.scores(plain.without_layers(model._module, blocks, {*removed, layer}, data), data)
            for layer in left
        }
        best = max(left, key=lambda layer: (tried[layer][0], round(tried[layer][1], 6), -layer))
        removed.append(best)
        expected.append((best, *tried[best]))
    table = result.table
    assert table["step"].tolist() == list(range(LAYERS + 1))
    assert table["layer"].tolist() == [layer for layer, _, _ in expected]
    assert table["accuracy"].tolist() == pytest.approx([accuracy for _, accuracy, _ in expected])
    assert table["probability"].tolist() == pytest.approx([p for _, _, p in expected], abs=1e-4)
    kept = [accuracy >= expected[0][1] - 0.05 for _, accuracy, _ in expected]
    assert result.meta["removable"] == (kept.index(False) if False in kept else len(kept)) - 1


def test_only_mambas_have_sites(case) -> None:
    model, _, data = case
    if not model.is_mamba:
        with pytest.raises(ValueError, match="need a Mamba"):
            resample_ablation(model, data)
    with pytest.raises(ValueError, match="no rows"):
        layer_removal(model, data[:0])
