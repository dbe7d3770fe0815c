"""Edge patching against plain twins: one edge, many edges, positions, rows of their own, other models."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mamba_ioi.circuits import Graph
from mamba_ioi.circuits.forward import beginning, record
from mamba_ioi.circuits.resample import resampled_logits, run_circuit
from mamba_ioi.models.model import MambaModel, wrap

from . import plain as hooks
from . import plain_circuits as plain
from .conftest import RANDOM, random_mamba

N, LENGTH, ROWS, VOCAB = 3, 7, 4, 61
STATES = [Graph(N, True, None, "states"), Graph(N, True, LENGTH, "states")]
TOKEN_EDGES = Graph(N, True, LENGTH, "tokens")
GRAPHS = [Graph(N), Graph(N, True), Graph(N, False, LENGTH), Graph(N, True, LENGTH), *STATES, TOKEN_EDGES]
TOKENS = torch.randint(0, VOCAB, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
LAST = torch.full((ROWS,), LENGTH - 1)


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    return wrap(RANDOM[request.param](seed=2), None, model_id="random")


def cuts(graph: Graph, most: int) -> list[set]:
    """Single edges, and sets of them."""
    rng, edges = random.Random(0), graph.edges()
    single = [{edge} for edge in (edges if len(edges) <= most else rng.sample(edges, most))]
    return [*single, *(set(rng.sample(edges, round(len(edges) * share))) for share in (0.1, 0.3, 0.5, 0.8, 0.95))]


def keep(graph: Graph, cut: list[set]) -> torch.Tensor:
    return torch.stack([~graph.mask(edges) for edges in cut])[:, None]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_any_set_of_edges_equals_the_twin(model: MambaModel, graph: Graph) -> None:
    module, positional = model._module, graph.length is not None
    corrupt = plain.mamba_run(module, TOKENS[1], LAST, ssm=graph.ssm)
    run = record(model, TOKENS[1], LAST, graph=graph)
    sets = cuts(graph, 40)
    found = resampled_logits(model, graph, TOKENS[0], LAST, run, keep(graph, sets))
    expected = [plain.mamba_run(module, TOKENS[0], LAST, corrupt, cut, positional, graph.ssm).logits for cut in sets]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert ((found - found[-1]).abs().amax((1, 2)) > 1e-2).sum() > 5  # the edges do something


@pytest.mark.parametrize("graph", [Graph(N), Graph(N, True), Graph(N, True, LENGTH), *STATES, TOKEN_EDGES], ids=str)
def test_whole_and_empty_graph(model: MambaModel, graph: Graph) -> None:
    run = record(model, TOKENS[1], LAST, graph=graph)
    masks = torch.stack([torch.ones(len(graph.pairs), graph.width), torch.zeros(len(graph.pairs), graph.width)])
    found = resampled_logits(model, graph, TOKENS[0], LAST, run, masks[:, None])
    for got, tokens in zip(found, TOKENS, strict=True):
        expected = model._module(tokens, use_cache=False).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_unembedding_is_one_product_of_all_rows(model: MambaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are not side by side in memory torch makes a product each, and reads the weights again for each."""
    seen, linear = [], torch.nn.functional.linear

    def noted(value, weight, bias=None):
        if weight is model._module.lm_head.weight:
            seen.append(value)
        return linear(value, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    record(model, TOKENS[1], LAST)
    assert [tuple(value.shape) for value in seen] == [(ROWS, 1, model.d_model)] and seen[0].is_contiguous()


@pytest.mark.parametrize("graph", [Graph(N), Graph(N, True), Graph(N, True, LENGTH), *STATES, TOKEN_EDGES], ids=str)
def test_pruned_edges_change_nothing(model: MambaModel, graph: Graph) -> None:
    run, graph = record(model, TOKENS[1], LAST, graph=graph), graph.on(model)
    generator = torch.Generator().manual_seed(1)
    masks = (
        torch.rand(6, len(graph.pairs), graph.width, generator=generator) < torch.linspace(0.3, 0.8, 6)[:, None, None]
    )
    pruned = torch.stack([graph.prune(mask) for mask in masks])
    assert (pruned != masks).any()
    whole, left = (resampled_logits(model, graph, TOKENS[0], LAST, run, some[:, None]) for some in (masks, pruned))
    torch.testing.assert_close(whole, left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("graph", [Graph(N), Graph(N, True, LENGTH), *STATES, TOKEN_EDGES], ids=str)
def test_each_row_its_own_circuit(model: MambaModel, graph: Graph) -> None:
    run = record(model, TOKENS[1], LAST, graph=graph)
    masks = torch.rand(2, ROWS, len(graph.pairs), graph.width, generator=torch.Generator().manual_seed(4)) < 0.6
    found = resampled_logits(model, graph, TOKENS[0], LAST, run, masks)
    for c in range(2):
        for row in range(ROWS):
            alone = resampled_logits(model, graph, TOKENS[0], LAST, run, masks[c, row][None, None])[0, row]
            torch.testing.assert_close(found[c, row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", STATES, ids=str)
@pytest.mark.parametrize("which", ["kept", "read"])
def test_states_are_mixed_as_hooks_mix_them(graph: Graph, which: str) -> None:
    """A share of the live state at each position, another in each row; C, D x and what comes before stay live.

    `kept` mixes the state that goes on, `read` what is read of it alone.
    """
    model = wrap(random_mamba(seed=2), None, model_id="random")
    layer, module = 1, model._module
    run = record(model, TOKENS[1], LAST, graph=Graph(3, fine=True, ssm="states"))
    weights = torch.rand(3, ROWS, graph.width, generator=torch.Generator().manual_seed(7))
    weights[1] = weights[1].round()
    keeping = torch.ones(3, ROWS, len(graph.pairs), graph.width)
    node = str(layer)
    edge = (f"{node}.conv", f"{node}.ssm") if which == "kept" else (f"{node}.ssm", node)
    keeping[:, :, graph.index[edge]] = weights
    found = resampled_logits(model, graph, TOKENS[0], LAST, run, keeping)
    there, mixer = hooks.values(module, TOKENS[1], "h", layer), module.backbone.layers[layer].mixer
    states, x = (hooks.values(module, TOKENS[0], site, layer) for site in ("h", "ssm_input"))
    C = mixer.x_proj(x)[..., -mixer.ssm_state_size :]
    for some, got in zip(weights, found, strict=True):
        share = some.expand(ROWS, LENGTH)[:, :, None, None]

        def mix(h: torch.Tensor, t: int, share=share) -> torch.Tensor:
            return share[:, t] * h + (1 - share[:, t]) * there[:, t]

        if which == "kept":
            change = hooks.edited(module, {("h", layer): mix})
        else:  # the layer's own states are not touched, and what is read of them is C mixed + D x
            y = ((share * states + (1 - share) * there) * C[:, :, None]).sum(-1) + mixer.D * x
            change = read_instead(mixer, y)
        with change, torch.no_grad():
            expected = module(TOKENS[0], use_cache=False).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    clean = module(TOKENS[0], use_cache=False).logits[:, -1]
    assert ((found - clean).abs().amax(-1) > 1e-2).any(1).all()


@contextmanager
def read_instead(mixer, y: torch.Tensor):
    """While open, the mixer's scan gives y, which its gate and output projection go on from."""
    gate = []
    handles = [
        mixer.in_proj.register_forward_hook(lambda _, args, output: gate.append(output.chunk(2, dim=-1)[1])),
        mixer.out_proj.register_forward_pre_hook(lambda _, args: (y * torch.nn.functional.silu(gate[-1]),)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_each_row_is_read_at_its_own_position(model: MambaModel) -> None:
    last = torch.tensor([3, 6, 5, 4])
    run = record(model, TOKENS[1], last)
    corrupt = plain.mamba_run(model._module, TOKENS[1], last)
    graph, cut = Graph(N), {("embed", "1"), ("0", "output")}
    found = resampled_logits(model, graph, TOKENS[0], last, run, keep(graph, [cut]))[0]
    expected = plain.mamba_run(model._module, TOKENS[0], last, corrupt, cut).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("parted", [1, 2, 5, LENGTH - 1])
def test_runs_begin_where_the_prompts_part(model: MambaModel, graph: Graph, parted: int) -> None:
    corrupt = torch.cat([TOKENS[0][:, :parted], TOKENS[1][:, parted:]], dim=1)
    whole = record(model, corrupt, LAST, graph=graph)
    begins = beginning(model, corrupt, parted)
    run = record(model, corrupt, LAST, begins, graph=graph)
    torch.testing.assert_close(run.logits, whole.logits, rtol=1e-5, atol=1e-5)
    for got, expected in zip(run.sources, whole.sources, strict=True):
        torch.testing.assert_close(got, expected[:, parted:], rtol=1e-5, atol=1e-5)
    sets = cuts(graph, 10)
    found, expected = (resampled_logits(model, graph, TOKENS[0], LAST, one, keep(graph, sets)) for one in (run, whole))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", RANDOM)
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_candidates_go_on_from_a_known_circuit(graph: Graph, family: str) -> None:
    model = wrap(RANDOM[family](seed=2), None, model_id="random")
    run = record(model, TOKENS[1], LAST, graph=graph)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(len(graph.pairs), graph.width, generator=generator) < 0.7
    base = run_circuit(model, graph, TOKENS[0], run, mask)
    ran = []
    for layer in range(N):
        model._module.backbone.layers[layer].mixer.in_proj.register_forward_hook(lambda *_, i=layer: ran.append(i))
    for layer in range(N + 1):
        nodes = [graph.into(layer)] if layer == N else [graph.into(layer), graph.inside(layer)]
        for edges in filter(lambda edges: edges.stop > edges.start, nodes):
            candidates = mask.repeat(3, 1, 1)
            candidates[0, edges] = True  # more than the known circuit has
            candidates[1, edges] = False
            candidates[2, edges.start :] = torch.rand(candidates[2, edges.start :].shape, generator=generator) < 0.6
            ran.clear()
            found = resampled_logits(model, graph, TOKENS[0], LAST, run, candidates[:, None], base)
            assert all(i >= layer for i in ran)
            expected = resampled_logits(model, graph, TOKENS[0], LAST, run, candidates[:, None])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def others() -> dict:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=N, n_head=2, n_positions=16))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=N,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    return {
        "gpt2": (gpt2.eval(), gpt2.transformer.h, gpt2.transformer.ln_f),
        "llama": (llama.eval(), llama.model.layers, llama.model.norm),
    }


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_models_equal_hooks(name: str) -> None:
    module, blocks, norm = others()[name]
    other = wrap(module, None, model_id=name)
    graph = Graph(N)
    sets = [set(), *cuts(graph, 10)]
    run = record(other, TOKENS[1], LAST)
    found = resampled_logits(other, graph, TOKENS[0], LAST, run, keep(graph, sets))
    corrupt = plain.hooked_run(module, blocks, norm, TOKENS[1], LAST)
    expected = [plain.hooked_run(module, blocks, norm, TOKENS[0], LAST, corrupt, cut).logits for cut in sets]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], module(TOKENS[0]).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert ((found - found[0]).abs().amax((1, 2))[1:] > 1e-4).any()


def test_what_does_not_fit_is_refused(model: MambaModel) -> None:
    graph = Graph(N)
    run = record(model, TOKENS[1], LAST)
    with pytest.raises(ValueError, match="do not fit"):
        resampled_logits(model, graph, TOKENS[0], LAST, run, torch.ones(1, 2, len(graph.pairs), 1))
    with pytest.raises(ValueError, match="one shape"):
        resampled_logits(model, graph, TOKENS[0][:, :5], LAST - 2, run, torch.ones(1, 1, len(graph.pairs), 1))
    with pytest.raises(ValueError, match="need a Mamba"):
        record(wrap(others()["gpt2"][0], None, model_id="gpt2"), TOKENS[0], LAST, graph=Graph(2, fine=True))
