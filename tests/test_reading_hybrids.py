"""The logit lens and direct effects on every hybrid, against hooks and mixers by hand, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mamba_ioi.experiments import direct_effects, logit_lens
from mamba_ioi.metrics import logit_diff

from .hybrid_models import MODELS, exact, short_pairs
from .plain_hybrids import find, mixer_of, run_by_hand
from .test_reading import ended, streams, toward

PAIRS = short_pairs()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention that writes to the stream; None if a block has none (Zamba2's writes to none)."""
    if find(block, "self_attn") is not None:
        return block.self_attn
    return block.mixer if getattr(block, "block_type", "") == "full_attention" else None


def at_last(module: nn.Module, edits: dict) -> dict[tuple[str, int], Tensor]:
    """Every site at the last position."""
    return {
        key: value[:, -1] for key, value in run_by_hand(module, PAIRS.clean_tokens, edits)[0].items() if key[0] != "A"
    }


def without(source: int):
    """An edit that takes a value away at one position."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, source] = 0
        return value

    return edit


def scan_shares(module: nn.Module, layer: int, mixer: nn.Module) -> Tensor:
    """``[L, B, D]``: y without a source's write, times what becomes of each channel; D x and a bias at the target."""
    plain = at_last(module, {})
    gain = plain["after_skip", layer] / plain["ssm_output", layer]
    weight, length = mixer.out_proj.weight, PAIRS.clean_tokens.shape[1]
    projected = plain["after_skip", layer] @ weight.T + (0 if mixer.out_proj.bias is None else mixer.out_proj.bias)
    scale = (plain["out_proj", layer] * projected).sum() / projected.pow(2).sum()
    found = []
    for source in range(length):
        gone = plain["y", layer] - at_last(module, {("write", layer): without(source)})["y", layer]
        found.append(scale * ((gone * gain) @ weight.T))
    found[-1] = plain["out_proj", layer] - sum(found[:-1])
    return torch.stack(found)


def attention_shares(module: nn.Module, layer: int, attention: nn.Module) -> Tensor:
    """``[L, B, D]``: what the attention adds less what it adds once a source's value is zero; a bias at the target."""
    plain, found = at_last(module, {})["attn_out", layer], []
    for source in range(PAIRS.clean_tokens.shape[1]):
        hook = attention.v_proj.register_forward_hook(lambda _, args, output, s=source: without(s)(output))
        found.append(plain - at_last(module, {})["attn_out", layer])
        hook.remove()
    found[-1] = plain - sum(found[:-1])
    return torch.stack(found)


def test_what_tokens_write_adds_up(model):
    """Each source's share of each mixer and attention, by taking it away; all shares are the logit difference."""
    module = exact(model)
    _, direction, _, difference = toward(model._module, PAIRS)
    result = direct_effects(model, PAIRS, "token")
    assert result.table["effect"].sum() == pytest.approx(float(difference.mean()), rel=1e-3, abs=1e-4)
    table = result.table.set_index(["layer", "part"]).sort_index()
    scale = float(result.table["effect"].abs().max())
    looked_at = []
    for layer, block in enumerate(module.model.layers):
        mixer, attention = mixer_of(block), attention_of(block)
        shares = {} if mixer is None else {"mixer": scan_shares(module, layer, mixer[1])}
        shares |= {} if attention is None else {"attn": attention_shares(module, layer, attention)}
        for part, each in shares.items():
            expected = (each * direction).sum(2).mean(1)
            found = table.loc[(layer, part)].sort_values("source")
            assert found["source"].tolist() == list(range(7))
            assert found["effect"].tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4 * scale), (
                layer,
                part,
            )
            looked_at.append(part)
    kinds = [kind for kinds in model.layer_kinds for kind in kinds.split("+")]
    attends = 0 if model.family == "zamba2" else kinds.count("attention")
    assert looked_at.count("attn") == attends and looked_at.count("mixer") == sum("mamba" in kind for kind in kinds)


def test_the_lens_and_what_layers_write(model):
    """The model's own end from each layer's stream, and the change of the stream in each layer."""
    module, rows = exact(model), torch.arange(3)
    found, direction, constant, difference = toward(model._module, PAIRS)
    table = logit_lens(model, PAIRS, positions=[2, 6]).table.set_index(["layer", "position"])
    for layer, stream in enumerate(found, start=-1):
        logits = ended(module, PAIRS.clean_tokens, stream)["logits"]
        for position in (2, 6):
            expected = logit_diff(logits[:, position], PAIRS.answers, PAIRS.corrupt_answers).mean()
            assert table.loc[(layer, position), "logit_diff"] == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
            answer = logits[rows, position, PAIRS.answers]
            rank = 1 + (logits[:, position] > answer[:, None]).sum(1).double().mean()
            assert table.loc[(layer, position), "rank"] == pytest.approx(float(rank), abs=0.34)
    result = direct_effects(model, PAIRS)
    effects = result.table.groupby("layer")["effect"].sum()
    each = torch.stack([(stream[:, -1] * direction).sum(1).mean() for stream in streams(module, PAIRS.clean_tokens)])
    size = float(each.abs().max())
    assert effects.loc[-1] == pytest.approx(float(each[0] + torch.as_tensor(constant).mean()), abs=1e-3 * size)
    assert effects.loc[0:].tolist() == pytest.approx(each.diff().tolist(), abs=1e-3 * size)
    assert result.meta["logit_diff"] == pytest.approx(float(difference.mean()), abs=1e-3 * size)
    assert effects.sum() == pytest.approx(result.meta["logit_diff"], abs=1e-3 * size)
