"""Circuits whose nodes are mixers, attention and MLPs: against forwards by hand in float64, and the coarse ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from mamba_ioi import PromptPairs
from mamba_ioi.circuits import (
    Circuit,
    Graph,
    acdc,
    eap,
    evaluate,
    exact_effects,
    minimal_circuit,
    to_dot,
    to_mib,
    top_k,
)
from mamba_ioi.circuits.search import scored_graph
from mamba_ioi.models.model import CausalLM, wrap

from .conftest import randomized
from .hybrid_models import FAMILIES, MODELS, V, differences, exact, short_pairs
from .plain_hybrids import run_by_hand
from .test_families import MODELS as SCANS

SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
SITES = {"": ("layer_input", "out_proj"), "attn": ("attn_in", "attn_out"), "mlp": ("mlp_in", "mlp_out")}
PLAIN = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, use_parallel_residual=True)),
    "neox sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, use_parallel_residual=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}
TRANSFORMERS = {name: wrap(randomized(make()), None, model_id=name) for name, make in PLAIN.items()}
EXACT = {name: copy.deepcopy(model._module).double() for name, model in TRANSFORMERS.items()}
ALL = {**{family: MODELS[family] for family in FAMILIES}, **TRANSFORMERS}
SPLIT = [name for name in ALL if name != "zamba2"]  # whose blocks are a mixer alone


@pytest.fixture(scope="module", params=SPLIT)
def model(request) -> CausalLM:
    return ALL[request.param]


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    return short_pairs()


@torch.no_grad()
def transformer_by_hand(module, ids: Tensor, edits: dict) -> tuple[dict, Tensor]:
    """What `run_by_hand` gives, of a GPT-NeoX or a Llama: the parts' inputs and what they add, by torch hooks."""
    acts, handles = {}, []

    def hook(place: str, site: tuple[str, int]):
        def change(value: Tensor) -> Tensor:
            acts[site] = edits.get(site, lambda same: same)(value)
            return acts[site]

        def before(_, args, kwargs):
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

        def after(_, args, output):
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        if place == "before":
            return lambda part: handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        return lambda part: handles.append(part.register_forward_hook(after))

    blocks = module.gpt_neox.layers if hasattr(module, "gpt_neox") else module.model.layers
    for i, block in enumerate(blocks):
        attention = block.attention if hasattr(block, "attention") else block.self_attn
        for place, name, part in (
            ("before", "resid_pre", block),
            ("before", "attn_in", block.input_layernorm),
            ("after", "attn_out", attention),
            ("before", "mlp_in", block.post_attention_layernorm),
            ("after", "mlp_out", block.mlp),
            ("after", "resid_post", block),
        ):
            hook(place, (name, i))(part)
    logits = module(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return acts, logits


def by_hand(model: CausalLM, ids: Tensor, edits: dict | None = None) -> tuple[dict, Tensor]:
    if model.model_id in EXACT:
        return transformer_by_hand(EXACT[model.model_id], ids, edits or {})
    return run_by_hand(exact(model), ids, edits)


def added(acts: dict, node: str) -> Tensor:
    """What a node adds to the stream."""
    layer, _, part = node.partition(".")
    return acts["resid_pre", 0] if node == "embed" else acts[SITES[part][1], int(layer)]


def reads(model: CausalLM, node: str) -> tuple[str, int]:
    """Where a node reads the stream; the output reads what comes after the last block."""
    layer, _, part = node.partition(".")
    return ("resid_post", model.n_layers - 1) if node == "output" else (SITES[part][0], int(layer))


@pytest.mark.conformance("parts")
def test_effects_of_edges(model, pairs):
    """Each edge alone: the destination reads the stream with what the source adds in the other run."""
    (here, high), (there, low) = (by_hand(model, ids) for ids in (pairs.clean_tokens, pairs.corrupt_tokens))
    high, low = differences(high, pairs), differences(low, pairs)
    table = exact_effects(model, pairs, parts=True).table
    seen = 0.0
    for row in table.itertuples():
        change = added(there, row.src) - added(here, row.src)
        edits = {reads(model, row.dst): lambda value, change=change: value + change}
        logits = by_hand(model, pairs.clean_tokens, edits)[1]
        effect = ((differences(logits, pairs) - high) / (high - low).abs()).mean().item()
        assert row.score == pytest.approx(effect, rel=5e-3, abs=1e-3), (row.src, row.dst)
        seen = max(seen, abs(effect))
    assert seen > 0.02


@pytest.mark.slow
@pytest.mark.conformance("parts")
def test_scores_at_the_clean_run_are_derivatives(model, pairs):
    """One step of gradients, against small changes of each destination's input, up and down; norms are in float32."""
    (here, high), (there, low) = (by_hand(model, ids) for ids in (pairs.clean_tokens, pairs.corrupt_tokens))
    spread = (differences(high, pairs) - differences(low, pairs)).abs()
    table, small = eap(model, pairs, steps=1, parts=True).table, 1e-3
    largest = table.score.abs().max()
    for row in table.itertuples():
        change, ends = small * (added(there, row.src) - added(here, row.src)), []
        for sign in (1, -1):
            edits = {reads(model, row.dst): lambda value, change=change, sign=sign: value + sign * change}
            ends.append(differences(by_hand(model, pairs.clean_tokens, edits)[1], pairs))
        slope = ((ends[0] - ends[1]) / spread).mean().item() / (2 * small)
        assert row.score == pytest.approx(slope, rel=1e-2, abs=2e-3 * largest), (row.src, row.dst)


@pytest.mark.conformance("parts")
def test_the_edges_between_two_blocks_sum_to_the_edge_between_them(model, pairs):
    coarse = eap(model, pairs, steps=3).table.set_index(["src", "dst"]).score
    parts = eap(model, pairs, steps=3, parts=True).table
    blocks = parts.assign(**{end: parts[end].str.split(".").str[0] for end in ("src", "dst")})
    sums = blocks[blocks.src != blocks.dst].groupby(["src", "dst"]).score.sum()
    assert set(sums.index) == set(coarse.index)
    largest = coarse.abs().max()
    assert largest > 1e-2
    for edge, score in coarse.items():
        assert sums[edge] == pytest.approx(score, abs=1e-4 * largest)


def test_a_cut_between_blocks_is_that_between_all_their_parts(model, pairs):
    """So a coarse circuit, with everything inside its blocks kept, does the same in the graph of parts."""
    graph = Graph(model.n_layers, parts=True).on(model)
    for dropped in (("embed", "1"), ("0", "2"), ("1", "output")):
        coarse = Circuit.of(model, [edge for edge in Graph(model.n_layers).edges() if edge != dropped])
        ends = [(src.split(".")[0], dst.split(".")[0]) for src, dst in graph.pairs]
        kept = [pair for pair, blocks in zip(graph.pairs, ends, strict=True) if blocks != dropped]
        fine = Circuit.of(model, kept)
        one, other = (evaluate(model, pairs, circuit) for circuit in (coarse, fine))
        assert other.nld == pytest.approx(one.nld, abs=1e-4) and len(fine) < len(graph)


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "neox"])
def test_positions_of_an_edge_sum_to_it(name, pairs):
    """And in `paper`, whose gradients pass through the patches."""
    for variant in ("standard", "paper"):
        whole = eap(ALL[name], pairs, steps=3, parts=True, variant=variant).table
        apart = eap(ALL[name], pairs, steps=3, parts=True, variant=variant, positional=True).table
        sums = apart.groupby(["src", "dst"]).score.sum()
        for row in whole.itertuples():
            assert sums[row.src, row.dst] == pytest.approx(row.score, rel=1e-3, abs=1e-4 * whole.score.abs().max())


@pytest.mark.parametrize("name", ["granitemoehybrid", "falcon_h1", "nemotron_h", "neox"])
def test_circuits_of_parts(name, pairs, tmp_path):
    model = ALL[name]
    scores = eap(model, pairs, steps=2, parts=True)
    graph, values = scored_graph(scores)
    assert graph == Graph(model.n_layers, parts=True).on(model)
    assert scored_graph(scores.table, model.n_layers)[0].pairs == graph.pairs
    for circuit in (
        minimal_circuit(model, pairs, scores, 0.3),
        acdc(model, pairs, top_k(scores, len(graph)), 0.01, fine=False),
        top_k(scores, len(graph) // 2),
    ):
        again = Circuit.load(circuit.save(tmp_path / "circuit.json"))
        assert again.edges == circuit.edges and again.graph == circuit.graph == graph
        assert evaluate(model, pairs, again).n_edges == len(circuit)
        assert all(f'"{src}" -> "{dst}"' in to_dot(circuit) for src, dst in circuit.edges)
    whole = evaluate(model, pairs, Circuit.of(model, graph.edges()), absolute=False)
    assert whole.nld == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="MIB"):
        to_mib(tmp_path / "mib.json", top_k(scores, 5), d_model=16)
    assert len(values) == len(graph)


def test_the_graph():
    graph = Graph(2, parts=True)
    assert graph.nodes == ("0", "0.attn", "0.mlp", "1", "1.attn", "1.mlp")
    assert graph.pairs[:5] == (
        ("embed", "0"),
        ("embed", "0.attn"),
        ("embed", "0.mlp"),
        ("0", "0.mlp"),
        ("0.attn", "0.mlp"),
    )
    assert ("0", "0.attn") not in graph.index and ("0.mlp", "1") in graph.index
    assert len(graph.pairs) == sum(len(graph.sources(i)) for i in range(7)) == 1 + 1 + 3 + 4 + 4 + 6 + 7
    assert [graph.pairs[graph.into(i)][-1] for i in (2, 6)] == [("0.attn", "0.mlp"), ("1.mlp", "output")]
    assert Graph.of(2, [("embed", "0.mlp")]).parts is True and Graph.of(2, [("embed", "0")]).parts is False
    assert Graph(1, parts=((("",),),)).pairs == Graph(1).pairs
    for parts in (((("x",),),), ((("",),), (("",),))):
        with pytest.raises(ValueError, match="parts are True, or"):
            Graph(1, parts=parts)
    fine = Graph(2, fine=True, parts=True)
    assert fine.pairs[:10] == (("embed", "0"), *fine.pairs[fine.inside(0)], ("embed", "0.attn"))
    assert [fine.splits(node) for node in range(6)] == [True, False, False] * 2 and len(fine) == len(graph) + 2 * 8
    assert [fine.pairs[fine.into(node)] for node in range(7)] == [graph.pairs[graph.into(node)] for node in range(7)]
    assert fine.inside(1) == fine.written(1) == slice(10, 10)


def test_dead_ends():
    """An MLP passes what it receives at its own position alone, attention to all later ones."""
    graph = Graph(1, length=3, parts=((("",), (".mlp",)),))
    last = {("embed", "0.mlp", 2), ("0.mlp", "output", 2)}
    assert set(graph.edges(graph.prune(graph.mask([("embed", "0.mlp"), ("0.mlp", "output")])))) == last
    kept = graph.edges(graph.prune(graph.mask([("embed", "0"), ("0", "output")])))
    assert set(kept) == {("embed", "0", 0), ("embed", "0", 1), ("embed", "0", 2), ("0", "output", 2)}
    other = Graph(1, parts=((("", ".attn"), (".mlp",)),))
    edges = [("embed", "0"), ("0", "0.mlp"), ("embed", "0.attn"), ("0.mlp", "output")]
    assert other.edges(other.prune(other.mask(edges))) == (("embed", "0"), ("0", "0.mlp"), ("0.mlp", "output"))


@pytest.mark.conformance("parts")
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "zamba2"])
def test_where_there_are_no_parts(family, pairs):
    """Mixers alone are one node; so are Zamba2's layers, whose shared block writes to no stream."""
    model = SCANS.get(family) or MODELS[family]
    graph = Graph(model.n_layers, parts=True).on(model)
    assert graph.nodes == tuple(map(str, range(model.n_layers))) and graph.parts is False
    one = PromptPairs(
        clean_tokens=pairs.clean_tokens % 20,
        corrupt_tokens=pairs.corrupt_tokens % 20,
        answers=pairs.answers % 20,
        corrupt_answers=pairs.corrupt_answers % 20 + 1,
    )
    assert eap(model, one, steps=2, parts=True).table.equals(eap(model, one, steps=2).table)
