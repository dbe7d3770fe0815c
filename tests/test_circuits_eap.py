"""Edge attribution patching against exact effects, and the algebra that its scores obey."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mamba_ioi import PromptPairs
from mamba_ioi.circuits import Graph, acdc, eap, exact_effects, minimal_circuit, rank_correlation, to_mib, top_k
from mamba_ioi.circuits.eap import Attributed, attribute, attributed
from mamba_ioi.circuits.forward import record
from mamba_ioi.circuits.pairs import Pairs
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset

from . import plain_circuits
from .conftest import RANDOM, random_mamba
from .plain import NAMES, prompt_tokenizer

TOKENIZER = prompt_tokenizer(NAMES)


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 4, seed=27)


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    return wrap(RANDOM[request.param](seed=2, vocab_size=len(TOKENIZER)), TOKENIZER, model_id="random")


@pytest.fixture(scope="module")
def linear() -> MambaModel:
    return wrap(plain_circuits.linear_mamba(len(TOKENIZER)), TOKENIZER, model_id="linear")


def pivot(result) -> dict:
    return {(row.src, row.dst, row.position): row.score for row in result.table.itertuples()}


@pytest.mark.parametrize("fine", [False, True])
def test_exact_effects_equal_the_twin(model: MambaModel, data: IOIDataset, fine: bool) -> None:
    module, graph = model._module, Graph(3, fine)
    corrupt = plain_circuits.mamba_run(module, data.corrupt_tokens, data.last_position)
    clean = plain_circuits.mamba_run(module, data.clean_tokens, data.last_position)
    found = exact_effects(model, data, fine=fine).table.score.tolist()
    for edge, effect in list(zip(graph.edges(), found, strict=True))[:: 4 if fine else 2]:
        run = plain_circuits.mamba_run(module, data.clean_tokens, data.last_position, corrupt, {edge})
        change = plain_circuits.nld(run, clean, corrupt, data) - plain_circuits.nld(clean, clean, corrupt, data)
        assert effect == pytest.approx(change.mean().item(), abs=2e-3)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("positional", [False, True])
def test_scores_are_the_effects_in_a_linear_model(
    linear: MambaModel, data: IOIDataset, steps: int, positional: bool
) -> None:
    scores = eap(linear, data, steps=steps, positional=positional, fine=not positional).table
    effects = exact_effects(linear, data, positional=positional, fine=not positional).table
    assert scores[["src", "dst", "position"]].equals(effects[["src", "dst", "position"]])
    torch.testing.assert_close(
        torch.tensor(scores.score.to_numpy()), torch.tensor(effects.score.to_numpy()), rtol=0, atol=1e-5
    )
    assert (effects.score.abs() > 1e-2).sum() > 5


def test_every_cut_sums_to_the_whole_change_in_a_linear_model(linear: MambaModel, data: IOIDataset) -> None:
    table = eap(linear, data, absolute=False).table
    place = {"embed": -1, "0": 0, "1": 1, "2": 2, "output": 3}
    for after in range(-1, 3):  # edges that cross from up to `after` to later nodes
        crossing = table[(table.src.map(place) <= after) & (table.dst.map(place) > after)]
        assert crossing.score.sum() == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "gpt2", "llama"])
def test_edges_out_of_embed_sum_to_the_whole_change_as_steps_grow(
    model: MambaModel, data: IOIDataset, kind: str
) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": len(TOKENIZER)}
    if kind == "gpt2":
        module = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **sizes)).eval()
        model = wrap(module, TOKENIZER, model_id=kind)
    elif kind == "llama":
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            **sizes,
        )
        model = wrap(LlamaForCausalLM(config).eval(), TOKENIZER, model_id=kind)
    errors = []
    for steps in (2, 8, 64):
        table = eap(model, data[:4], steps=steps, absolute=False).table
        errors.append(abs(table[table.src == "embed"].score.sum() + 1))
    assert errors[2] < errors[0] and errors[2] < 0.03


def test_integrated_gradients_converge(model: MambaModel, data: IOIDataset) -> None:
    data = data[:4]
    finest = torch.tensor(eap(model, data, steps=80).table.score.to_numpy())
    away = [
        (torch.tensor(eap(model, data, steps=steps).table.score.to_numpy()) - finest).abs().max().item()
        for steps in (5, 15, 40)
    ]
    assert away[0] > away[1] > away[2] and away[2] < 0.1 * finest.abs().max()


@pytest.mark.parametrize("fine", [False, True])
def test_scores_rank_edges_as_their_effects_do(model: MambaModel, data: IOIDataset, fine: bool) -> None:
    effects = exact_effects(model, data, fine=fine, absolute=False)
    assert rank_correlation(eap(model, data, fine=fine, absolute=False), effects) > 0.75


def test_positions_sum_to_the_edge(model: MambaModel, data: IOIDataset) -> None:
    for variant in ("standard", "paper"):
        whole = eap(model, data, variant=variant, fine=True).table.set_index(["src", "dst"]).score
        parts = eap(model, data, variant=variant, fine=True, positional=True).table
        assert parts.position.max() == 19
        summed = parts.groupby(["src", "dst"]).score.sum()
        assert (summed - whole).abs().max() < 1e-5


def test_inner_edges_add_up(model: MambaModel, data: IOIDataset) -> None:
    coarse = pivot(eap(model, data))
    scores = pivot(eap(model, data, fine=True))
    assert all(scores[edge] == pytest.approx(value, rel=1e-4, abs=1e-6) for edge, value in coarse.items())
    for layer in ("0", "1", "2"):
        slices = [scores[layer, f"{layer}.conv[{s}]", -1] for s in (-3, -2, -1, 0)]
        assert sum(slices) == pytest.approx(scores[f"{layer}.conv", f"{layer}.ssm", -1], abs=1e-6)
        assert scores[layer, f"{layer}.skip", -1] == scores[f"{layer}.skip", layer, -1]


def test_what_enters_a_linear_layer_leaves_it(linear: MambaModel, data: IOIDataset) -> None:
    scores = pivot(eap(linear, data, fine=True))
    for layer in ("0", "1", "2"):
        enters = sum(score for (src, dst, _), score in scores.items() if dst == layer and "." not in src)
        inside = scores[f"{layer}.ssm", layer, -1] + scores[f"{layer}.skip", layer, -1]
        leaves = sum(score for (src, dst, _), score in scores.items() if src == layer and "." not in dst)
        through = scores[f"{layer}.conv", f"{layer}.ssm", -1]
        assert enters == pytest.approx(leaves, abs=1e-5)
        assert inside == pytest.approx(leaves, abs=1e-5) and through == pytest.approx(leaves, abs=1e-5)


class Watched(Attributed):
    """The pass of `eap`, keeping the gradient at every input."""

    def into(self, layer, resid):
        value = super().into(layer, resid)
        value.register_hook(lambda gradient: self.gradients.insert(0, gradient))
        return value


def gradients_at_inputs(model, data: IOIDataset, alpha: float, variant: str) -> list[torch.Tensor]:
    """The gradient at each layer's input, then at the output node's."""
    pairs = Pairs.of(model, data)
    clean, corrupt = (record(model, tokens, pairs.last) for tokens in (pairs.clean, pairs.corrupt))
    visitor = Watched(Graph(model.n_layers), alpha, corrupt, clean if variant == "standard" else None)
    visitor.gradients = []
    with torch.enable_grad(), model.trace(pairs.clean):
        attributed(model, visitor, pairs, torch.ones(len(pairs)))
    return visitor.gradients


def step(model, data: IOIDataset, alpha: float, variant: str, fine: bool = False) -> dict:
    """One step's scores, as a mapping of edges."""
    pairs = Pairs.of(model, data)
    graph = Graph(model.n_layers, fine)
    clean, corrupt = (record(model, tokens, pairs.last, graph=graph) for tokens in (pairs.clean, pairs.corrupt))
    scores = attribute(model, graph, pairs, clean, corrupt, torch.ones(len(pairs)), alpha, variant)
    return dict(zip(graph.pairs, scores.flatten().tolist(), strict=True))


def test_paper_variant_has_no_gradient_into_layers_at_the_end(model: MambaModel, data: IOIDataset) -> None:
    for variant in ("paper", "standard"):
        gradients = gradients_at_inputs(model, data, 1.0, variant)
        at_layers, at_output = gradients[:-1], gradients[-1]
        assert at_output.abs().max() > 1e-3
        assert all(bool(gradient.any()) == (variant == "standard") for gradient in at_layers)


def test_paper_variant_shrinks_gradients(linear: MambaModel, data: IOIDataset) -> None:
    full = step(linear, data, 0.0, "standard")
    for alpha in (0.0, 0.25, 0.5):
        found = step(linear, data, alpha, "paper")
        assert found["embed", "2"] == pytest.approx((1 - alpha) * full["embed", "2"], rel=1e-3)
        assert found["embed", "output"] == pytest.approx(full["embed", "output"], rel=1e-3)


def test_variants_agree_at_the_clean_run(model: MambaModel, data: IOIDataset) -> None:
    plain, papers = (
        eap(model, data, steps=1, variant=variant, fine=True).table.score for variant in ("standard", "paper")
    )
    assert (plain - papers).abs().max() < 1e-5


def test_batches_give_the_same_scores(model: MambaModel, data: IOIDataset) -> None:
    whole, parts = eap(model, data, fine=True).table.score, eap(model, data, fine=True, batch_rows=5).table.score
    assert (whole - parts).abs().max() < 1e-5


def test_parameters_are_left_alone(model: MambaModel, data: IOIDataset) -> None:
    before = [parameter.requires_grad for parameter in model._module.parameters()]
    eap(model, data[:2], steps=1, fine=True)
    assert [parameter.requires_grad for parameter in model._module.parameters()] == before
    assert all(parameter.grad is None for parameter in model._module.parameters())


def test_half_precision_follows(data: IOIDataset) -> None:
    module = random_mamba(seed=2, vocab_size=len(TOKENIZER))
    full = eap(wrap(module, TOKENIZER, model_id="full"), data, steps=2, absolute=False)
    half = eap(wrap(module.to(torch.bfloat16), TOKENIZER, model_id="half"), data, steps=2, absolute=False)
    assert rank_correlation(full, half) > 0.8


# ---------------------------------------------------------------------------------------------------------------------
# Marks
# ---------------------------------------------------------------------------------------------------------------------

MARKS = ["n5", "n4+1", "some", "last"]


@pytest.fixture(scope="module")
def uneven() -> PromptPairs:
    """Rows of different lengths; one mark is not in every row."""
    data = IOIDataset.generate(TOKENIZER, 6, seed=2, templates="all")
    assert data.position_labels is None and len(data.last_position.unique()) > 1
    some = data.last_position - 2
    some[::3] = -1
    return replace(data, marks={"some": some})


@pytest.fixture(scope="module")
def double() -> MambaModel:
    return wrap(random_mamba(seed=2, vocab_size=len(TOKENIZER)).double(), TOKENIZER, model_id="double")


@pytest.mark.parametrize("variant", ["standard", "paper"])
@pytest.mark.parametrize("fine", [False, True])
def test_marks_gather_each_rows_own_positions(double, uneven: PromptPairs, variant: str, fine: bool) -> None:
    """Against each row alone, scored by position; and over its marks and the rest, an edge has its whole score."""
    arguments = {"steps": 2, "variant": variant, "fine": fine}
    found = eap(double, uneven, positional=True, marks=MARKS, **arguments)
    table = found.table
    assert list(table.columns) == ["src", "dst", "mark", "score"]
    assert table["mark"].tolist()[:5] == [*MARKS, "other"] and found.meta["arguments"]["marks"] == MARKS
    graph = Graph(3, fine)
    expected = torch.zeros(len(graph.pairs), len(MARKS) + 1, dtype=torch.float64)
    for row in range(len(uneven)):
        one = uneven[row]
        alone = torch.tensor(eap(double, one, positional=True, **arguments).table["score"].to_numpy())
        alone = alone.view(len(graph.pairs), -1)
        rest = set(range(alone.shape[1]))
        for number, mark in enumerate(MARKS):
            if (at := int(one.positions_of(mark))) >= 0:
                expected[:, number] += alone[:, at] / len(uneven)
                rest -= {at}
        expected[:, -1] += alone[:, sorted(rest)].sum(1) / len(uneven)
    scores = torch.tensor(table["score"].to_numpy()).view_as(expected)
    assert (scores.abs().amax(0) > 1e-4).all()
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)  # transformers' RMSNorm computes in float32
    whole = torch.tensor(eap(double, uneven, **arguments).table["score"].to_numpy())
    torch.testing.assert_close(scores.sum(1), whole, rtol=0, atol=1e-12)


def test_marks_are_exact_in_a_linear_model(linear: MambaModel, uneven: PromptPairs) -> None:
    """Against runs by hand of each row, with one edge cut at the row's own position."""
    table = eap(linear, uneven, steps=1, marks=MARKS).table.set_index(["src", "dst", "mark"])["score"]
    module, effects = linear._module, {}
    for row in range(len(uneven)):
        one = uneven[row]
        length = int(one.last_position) + 1
        clean, corrupt = (tokens[:, :length] for tokens in (one.clean_tokens, one.corrupt_tokens))
        there = plain_circuits.mamba_run(module, corrupt, one.last_position)
        here = plain_circuits.mamba_run(module, clean, one.last_position)
        for src, dst in (("embed", "0"), ("0", "2"), ("embed", "output"), ("1", "output")):
            for mark in MARKS:
                if (at := int(one.positions_of(mark))) >= 0:
                    cut = {(src, dst, at)}
                    run = plain_circuits.mamba_run(module, clean, one.last_position, there, cut, positional=True)
                    change = plain_circuits.nld(run, here, there, one) - plain_circuits.nld(here, here, there, one)
                    effects[src, dst, mark] = effects.get((src, dst, mark), 0) + change.item() / len(uneven)
    assert max(map(abs, effects.values())) > 1e-2
    for edge, effect in effects.items():
        assert table[edge] == pytest.approx(effect, abs=1e-5), edge


def test_aligned_rows_score_alike_by_marks_and_positions(model: MambaModel, data: IOIDataset) -> None:
    by_mark = eap(model, data, marks=["n1", "n4+1", "last"]).table
    by_position = eap(model, data, positional=True).table
    for mark in ("n1", "n4+1", "last"):
        at = int(data.positions_of(mark)[0])
        one = by_mark[by_mark["mark"] == mark]["score"].to_numpy()
        other = by_position[by_position["position"] == at]["score"].to_numpy()
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-6)


def test_scores_by_marks_are_drawn_and_compared_and_no_circuits(model: MambaModel, uneven, data, tmp_path) -> None:
    found = eap(model, uneven, steps=1, marks=["n1", "last"])
    panels = [axes.get_title() for axes in found.plot().axes if axes.get_title()]
    assert panels == ["n1", "last", "other"]
    assert rank_correlation(found, eap(model, uneven, steps=1, marks=["last", "n1"])) == pytest.approx(1)
    with pytest.raises(ValueError, match="share 0 edges"):
        rank_correlation(found, eap(model, data, steps=1))
    empty = minimal_circuit(model, data, eap(model, data, steps=1))
    for use in (
        lambda: minimal_circuit(model, uneven, found),
        lambda: top_k(found, 3),
        lambda: to_mib(tmp_path / "circuit.json", empty, d_model=16, scores=found),
    ):
        with pytest.raises(ValueError, match="these scores are kept apart by marks, and a circuit's edges are not"):
            use()
    with pytest.raises(ValueError, match="a circuit is a Circuit, not Result; minimal_circuit makes one of scores"):
        acdc(model, uneven, found)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (["n6"], "the data have no mark 'n6'; they have 'last', 'n1'"),
        (["n1", "n1+2", "n2"], r"row 0: the marks 'n1\+2' and 'n2' both stand at position"),
        (["n1", "other"], "the data have no mark 'other'"),
        ([], "at least one, each once"),
        (["n1", "n1"], "at least one, each once"),
        (["last+1"], r"row 0 of mark 'last\+1'"),
    ],
)
def test_marks_that_do_not_fit(model: MambaModel, uneven: PromptPairs, marks: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eap(model, uneven, marks=marks)


def test_a_mark_called_as_the_rest_is_refused(model: MambaModel, data: IOIDataset) -> None:
    with pytest.raises(ValueError, match="'other' is what positions at no mark are called"):
        eap(model, replace(data, marks={"other": data.last_position - 1}), marks=["other"])


def test_what_does_not_fit_is_refused(model: MambaModel, data: IOIDataset) -> None:
    with pytest.raises(ValueError, match="must have one length"):
        replace(data, corrupt_tokens=data.corrupt_tokens[:, :-1])
    shorter = data.corrupt_tokens.clone()
    shorter[0, -1] += 1
    with pytest.raises(ValueError, match="row 0: the clean and the corrupt prompt differ in length"):
        replace(data, corrupt_tokens=shorter, last_position=data.last_position - 1)
    with pytest.raises(
        ValueError, match=f"row 1 of answers: 5000 .* vocabulary, whose tokens are 0 to {len(TOKENIZER) - 1}"
    ):
        answers, candidates = data.answers.clone(), data.candidates.clone()
        candidates[1, candidates[1] == answers[1]] = answers[1] = 5000
        eap(model, replace(data, answers=answers, candidates=candidates))
    with pytest.raises(ValueError, match="aligned"):
        eap(model, IOIDataset.generate(TOKENIZER, 12, templates="all"), positional=True)
    with pytest.raises(ValueError, match="variant is one of"):
        eap(model, data, variant="other")
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        eap(model, data, steps=0)
    with pytest.raises(ValueError, match="no rows"):
        eap(model, data[[]])
    with pytest.raises(ValueError, match="scores are a Result or its table, not NoneType"):
        rank_correlation(eap(model, data, steps=1), None)
