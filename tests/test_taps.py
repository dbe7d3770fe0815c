"""A conv of any number of taps, one included: sites, runs, generation, tap slices, and fine edges are those of K."""

from __future__ import annotations

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from mamba_ioi import Cut, Patch, cache, generate, run, token_contributions
from mamba_ioi.circuits import Circuit, Graph, acdc, eap, evaluate, exact_effects, layer_view
from mamba_ioi.circuits.graph import inner_edges
from mamba_ioi.circuits.pipeline import layer_parts
from mamba_ioi.experiments import conv_slices
from mamba_ioi.model import MambaModel, wrap
from mamba_ioi.tasks import generate as draw
from mamba_ioi.zoo.word_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(6)
PAIRS = draw("recall", TOKENIZER, 40, pairs=3).select(asked=2)[:4]
SIZES = {"vocab_size": len(TOKENIZER), "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4}


def build(family: str, taps: int) -> MambaModel:
    """A small random model whose conv has so many taps."""
    torch.manual_seed(taps)
    if family == "mamba":
        module = MambaForCausalLM(MambaConfig(**SIZES, time_step_rank=2, conv_kernel=taps))
    else:
        sizes = {"num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 8}
        module = Mamba2ForCausalLM(Mamba2Config(**SIZES, **sizes, conv_kernel=taps))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return wrap(module.eval(), TOKENIZER, model_id=f"{family}, {taps} taps")


@pytest.fixture(scope="module", params=[("mamba", 1), ("mamba", 2), ("mamba2", 1), ("mamba", 6)], ids=str)
def model(request: pytest.FixtureRequest) -> MambaModel:
    return build(*request.param)


def plain(model: MambaModel, tokens: torch.Tensor) -> torch.Tensor:
    """Hugging Face's own logits at the last position."""
    with torch.no_grad():
        return model._module(tokens, use_cache=False).logits[:, -1]


def test_the_terms_of_the_taps_sum_to_the_conv(model: MambaModel) -> None:
    tokens, taps = PAIRS.clean_tokens, model.d_conv
    acts = cache(model, tokens, [("conv_slice", 1), ("conv", 1), ("in_proj", 1)])
    terms, conv = acts["conv_slice", 1], model._module.backbone.layers[1].mixer.conv1d
    assert terms.shape[-1] == taps
    torch.testing.assert_close(terms.sum(-1) + conv.bias.detach(), acts["conv", 1], rtol=1e-5, atol=1e-6)
    for back in range(min(taps, tokens.shape[1])):  # each term by hand: a weight times what stood so far back
        by_hand = acts["in_proj", 1][:, : tokens.shape[1] - back] * conv.weight.detach()[:, 0, taps - 1 - back]
        torch.testing.assert_close(terms[:, back:, :, taps - 1 - back], by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(model, tokens), plain(model, tokens), rtol=1e-4, atol=1e-5)


def test_generation_with_the_cache_is_recomputation(model: MambaModel) -> None:
    grown = PAIRS.clean_tokens
    for _ in range(3):
        grown = torch.cat([grown, plain(model, grown).argmax(1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, PAIRS.clean_tokens, 3), grown)


def test_taps_are_those_that_the_conv_has(model: MambaModel) -> None:
    found = conv_slices(model, PAIRS, layer=0, progress=False)
    assert sorted(set(found.table["slice"])) == list(range(1 - model.d_conv, 1))
    first = 1 - model.d_conv - 1
    with pytest.raises(ValueError, match="slices are"):
        run(model, PAIRS.clean_tokens, [Patch("conv_slice", 0, 0.0, [2], slice=first)])
    cut = run(model, PAIRS.clean_tokens, [Cut(0, [2], [2, 7], conv=True)])
    assert cut.shape == (4, len(TOKENIZER)) and not torch.equal(cut, run(model, PAIRS.clean_tokens))
    whole = token_contributions(model, PAIRS.clean_tokens, 0).sum(2)
    torch.testing.assert_close(whole, cache(model, PAIRS.clean_tokens, [("out_proj", 0)])["out_proj", 0])


def test_fine_edges_are_those_of_the_taps(model: MambaModel) -> None:
    taps = model.d_conv
    scores = eap(model, PAIRS, steps=1, fine=True, progress=False)
    inside = [(src, dst) for src, dst in zip(scores.table.src, scores.table.dst, strict=True) if "." in src + dst]
    assert inside == [*inner_edges(0, taps), *inner_edges(1, taps)] and len(inside) == 2 * (taps + 4)
    assert scores.meta["graph"]["taps"] == taps
    measured = exact_effects(model, PAIRS, fine=True, progress=False).table
    assert list(zip(measured.src, measured.dst, strict=True)) == list(
        zip(scores.table.src, scores.table.dst, strict=True)
    )
    nothing = Circuit.of(model, [edge for edge in Graph(2, fine=True).on(model).edges() if "conv[" not in edge[1]])
    assert nothing.taps == taps and evaluate(model, PAIRS, nothing).nld is not None


def test_a_cut_of_every_tap_is_a_resampled_conv(model: MambaModel) -> None:
    """By hand: with all edges into layer 1's taps cut, its conv is that of the corrupt prompt."""
    graph = Graph(2, fine=True).on(model)
    circuit = Circuit.of(model, [edge for edge in graph.edges() if not edge[1].startswith("1.conv[")])
    there = cache(model, PAIRS.corrupt_tokens, [("conv", 1)])["conv", 1]
    by_hand = run(model, PAIRS.clean_tokens, [Patch("conv", 1, there)])
    right = PAIRS.answers, PAIRS.corrupt_answers
    difference = (by_hand.gather(1, right[0][:, None]) - by_hand.gather(1, right[1][:, None])).mean()
    found = evaluate(model, PAIRS, circuit, metric="logit_diff")
    assert found.logit_diff == pytest.approx(float(difference), abs=1e-5)


def test_acdc_and_its_figure(model: MambaModel, tmp_path) -> None:
    circuit = acdc(model, PAIRS, threshold=1e9, fine=True, progress=False)
    assert circuit.taps == model.d_conv and len(circuit) == 0
    again = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert again.taps == model.d_conv and again.graph == circuit.graph
    whole = Circuit.of(model, circuit.graph.edges())
    near = layer_view(whole, 1)
    assert near.graph == whole.graph and set(near.edges) >= set(inner_edges(1, model.d_conv))
    labels = [
        text.get_text()
        for text in layer_parts(model, PAIRS, held_out=None, progress=False).plot().axes[0].get_xticklabels()
    ]
    assert labels == [*(str(-back).replace("-", "−") for back in range(model.d_conv)), "skip", "ssm"]
