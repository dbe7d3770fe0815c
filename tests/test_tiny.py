"""The embedded `tiny` and `tiny-mamba2`: tokenizer against GPT-NeoX's, weights, accuracy, and training."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mamba_ioi import load_model
from mamba_ioi.names import NAMES, single_token_names
from mamba_ioi.tasks.ioi import BOS, CORRUPTIONS, OBJECTS, PLACES, TEMPLATES, IOIDataset
from mamba_ioi.zoo import EMBEDDED
from mamba_ioi.zoo.fast_forward import fast_logits
from mamba_ioi.zoo.prompts import Prompts
from mamba_ioi.zoo.tokenizer import TINY_NAMES, build_tokenizer
from mamba_ioi.zoo.train_tiny import train

KINDS = {"tiny": MambaForCausalLM, "tiny-mamba2": Mamba2ForCausalLM}
BUILT = build_tokenizer()


@pytest.fixture(scope="module")
def neox(shared: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(shared / "data" / "20B_tokenizer.json"))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    return EMBEDDED[request.param]


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def fill(template: str, names: list[str], place: str, thing: str) -> str:
    for name in names:
        template = template.replace("[NAME]", name, 1)
    return BOS + template.replace("[PLACE]", place).replace("[OBJECT]", thing)


def held_out_prompts(prompts: Prompts, template: str, count: int) -> tuple[list[str], list[list[str]]]:
    """Texts with name triples that training never saw, and the three names of each, the answer first."""
    rng = random.Random(template)
    texts, names = [], []
    while len(texts) < count:
        triple = rng.sample(range(len(TINY_NAMES)), 3)
        if prompts.held_out(torch.tensor([triple])):
            answer, first, second = (TINY_NAMES[index] for index in triple)
            opening = rng.sample([answer, first, second], 3)
            texts.append(fill(template, [*opening, first, second], rng.choice(PLACES), rng.choice(OBJECTS)))
            names.append([answer, first, second])
    return texts, names


def last_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():  # a few rows at a time: the model's own scan holds every state
        parts = [model(part, use_cache=False, logits_to_keep=1).logits[:, -1] for part in tokens.split(16)]
    return torch.cat(parts)


class TestTokenizer:
    def test_the_packaged_one_is_the_built_one(self, tokenizer):
        assert tokenizer.get_vocab() == BUILT.get_vocab()
        assert tokenizer.backend_tokenizer.to_str() == BUILT.backend_tokenizer.to_str()

    def test_segments_every_template_with_every_name_place_and_object_as_gpt_neox(self, tokenizer, neox):
        pairs = itertools.cycle(itertools.product(PLACES, OBJECTS))
        for template in TEMPLATES:
            for k in range(len(TINY_NAMES)):
                names = [TINY_NAMES[(k + step) % len(TINY_NAMES)] for step in (0, 1, 5, 7, 31)]
                text = fill(template, names, *next(pairs))
                ours = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
                assert ours == neox.convert_ids_to_tokens(neox(text)["input_ids"])

    @pytest.mark.parametrize(("number", "length", "positions"), [(0, 20, 3), (1, 20, 3), (2, 19, 2), (3, 20, 3)])
    def test_lengths_and_name_positions(self, tokenizer, number, length, positions):
        names = ["Lauren", "Isaac", "Lucas", "John", "Mary"]
        tokens = tokenizer.convert_ids_to_tokens(
            tokenizer(fill(TEMPLATES[number], names, "office", "kiss"))["input_ids"]
        )
        assert len(tokens) == length and tokens[0] == BOS
        assert [tokens.index(f"Ġ{name}") - positions for name in names] == [0, 2, 4, 10, 12]

    def test_the_names_are_those_a_dataset_keeps(self, tokenizer, neox):
        assert single_token_names(tokenizer) == list(TINY_NAMES)
        assert len(TINY_NAMES) == len(set(TINY_NAMES)) >= 120
        assert set(TINY_NAMES) < set(NAMES)
        assert {len(ids) for ids in neox([f" {name}" for name in TINY_NAMES])["input_ids"]} == {1}

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
        assert tokenizer.padding_side == "right"
        assert tokenizer("Then")["input_ids"] == tokenizer("Then", add_special_tokens=False)["input_ids"] != [0]
        assert tokenizer(BOS)["input_ids"] == [0]

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def test_any_text_decodes_to_itself(self, text):
        assert BUILT.decode(BUILT(text)["input_ids"]) == text

    def test_other_names_are_several_tokens(self, tokenizer):
        others = [name for name in NAMES if name not in TINY_NAMES]
        counts = [len(ids) for ids in tokenizer([f" {name}" for name in others])["input_ids"]]
        assert min(counts) >= 2 and sum(counts) / len(counts) < 4

    def test_takes_other_names(self):
        few = build_tokenizer(["Zoe", "Daniel"])
        assert single_token_names(few) == ["Daniel", "Zoe"]
        assert few.convert_ids_to_tokens(few(" Zoe")["input_ids"]) == ["ĠZoe"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["Ann", "Anna"], "prefix"),
            (["Zoe", "Zoe"], "more than once"),
            (["Mary Ann"], "one token"),
            (["zoe"], "zoe"),
        ],
    )
    def test_refuses_bad_names(self, names, message):
        with pytest.raises(ValueError, match=message):
            build_tokenizer(names)


class TestModel:
    def test_size_and_shape(self, folder, model, tokenizer):
        weights = folder / "model.safetensors"
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
        with safe_open(weights, framework="pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
        config = model.config
        assert 6 <= config.num_hidden_layers <= 8 and 96 <= config.hidden_size <= 128
        assert (config.conv_kernel, config.expand) == (4, 2)
        assert config.vocab_size == len(tokenizer)
        assert model.lm_head.weight is model.backbone.embeddings.weight

    def test_sizes_of_the_scan(self):
        one, two = (AutoModelForCausalLM.from_pretrained(EMBEDDED[name]).config for name in KINDS)
        assert one.state_size == 16
        sizes = [two.num_heads, two.head_dim, two.n_groups, two.state_size, two.hidden_size, 2 * two.hidden_size]
        assert len(set(sizes)) == len(sizes), "a size taken for another shows"
        assert two.n_groups == 1, "the gated norm of several groups is another since transformers 5.24"
        assert two.chunk_size >= 20 and two.time_step_limit[0] == 0.0

    @pytest.mark.parametrize("name", KINDS)
    def test_is_loaded_by_its_name(self, name):
        loaded = load_model(name)
        assert type(loaded._module) is KINDS[name] and loaded.model_id == name
        weights = AutoModelForCausalLM.from_pretrained(EMBEDDED[name]).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in loaded._module.state_dict().items())
        assert loaded.tokenizer.get_vocab() == BUILT.get_vocab()

    @pytest.mark.parametrize("number", range(4))
    def test_accuracy_on_held_out_triples(self, model, tokenizer, number):
        texts, names = held_out_prompts(Prompts(tokenizer, TINY_NAMES), TEMPLATES[number], 400)
        logits = last_logits(model, torch.tensor(tokenizer(texts)["input_ids"]))
        ids = torch.tensor([[tokenizer.convert_tokens_to_ids(f"Ġ{name}") for name in row] for row in names])
        assert (logits.gather(1, ids).argmax(1) == 0).float().mean() >= 0.99
        assert (logits.argmax(1) == ids[:, 0]).float().mean() >= 0.97

    @pytest.mark.slow
    @pytest.mark.parametrize("corruption", CORRUPTIONS)
    def test_accuracy_on_both_sides_of_every_corruption(self, model, tokenizer, corruption):
        data = IOIDataset.generate(tokenizer, 150, seed=28, templates="aligned", corruptions=[corruption])
        logits = last_logits(model, data.clean_tokens)
        candidates = logits.gather(1, data.candidates.clamp(min=0)).masked_fill(data.candidates < 0, -torch.inf)
        best = data.candidates.gather(1, candidates.argmax(1, keepdim=True)).squeeze(1)
        assert (best == data.answers).float().mean() >= 0.99

    def test_the_card_states_what_training_measured(self, folder, model):
        report = json.loads((folder / "training.json").read_text())
        card = " ".join((folder / "README.md").read_text().split())
        config = model.config
        sizes = f"{config.num_hidden_layers} layers, d_model {config.hidden_size}, d_inner {2 * config.hidden_size}"
        assert sizes in card and f"d_state {config.state_size}, d_conv {config.conv_kernel}" in card
        assert type(model).__name__ in card and f"{model.num_parameters():,} parameters" in card
        assert "license: mit" in card and f"{report['steps']} steps" in card and f"seed {report['seed']}" in card
        for measured in report["held_out"]:
            assert measured["candidates"] >= 0.99 and measured["vocabulary"] >= 0.97
            assert f"{measured['candidates']:.4f} | {measured['vocabulary']:.4f}" in card


class TestTraining:
    def test_fast_forward_is_the_models_forward(self):
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=3, time_step_rank=3)
        model = MambaForCausalLM(config).train()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        tokens = torch.randint(40, (5, 9))
        gradients, logits = [], []
        for forward in (lambda: model(tokens, use_cache=False).logits, lambda: fast_logits(model, tokens)):
            model.zero_grad()
            logits.append(forward())
            F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
        for plain, fast in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-6)

    def test_training_prompts_never_hold_a_held_out_triple(self):
        prompts = Prompts(BUILT, TINY_NAMES)
        index = {token: k for k, token in enumerate(prompts.names.tolist())}
        generator = torch.Generator().manual_seed(3)
        orders, openings, two = set(), set(), 0
        for _ in range(30):
            for row in prompts.batch(64, generator).tolist():
                names = [index[token] for token in row if token in index]
                text = BUILT.decode([token for token in row if token >= 0])
                openings.add(text[len(BOS) :].split(" ")[0])
                if len(names) == 4:
                    a, b, repeated, answer = names
                    assert {a, b} == {repeated, answer}
                    two += 1
                else:
                    *first, x, y, answer = names
                    assert set(first) == {x, y, answer} and len(set(first)) == 3
                    assert not prompts.held_out(torch.tensor([first]))
                    orders.add((first.index(x), first.index(y), first.index(answer)))
        assert orders == set(itertools.permutations(range(3)))
        assert openings == {"Then,", "Afterwards", "When", "Friends"} and two == 30 * 16

    def test_an_eighth_of_the_triples_is_held_out_in_whatever_order(self):
        prompts = Prompts(BUILT, TINY_NAMES)
        triples = torch.combinations(torch.arange(len(TINY_NAMES)), 3)
        held_out = prompts.held_out(triples)
        assert held_out.float().mean().item() == pytest.approx(1 / 8, abs=0.01)
        assert torch.equal(prompts.held_out(triples[:, [2, 0, 1]]), held_out)

    @pytest.mark.slow
    @pytest.mark.parametrize(("family", "kind"), [("mamba", MambaForCausalLM), ("mamba2", Mamba2ForCausalLM)])
    def test_a_few_steps_write_a_model_that_loads_and_the_seed_fixes_it(self, tmp_path, family, kind):
        torch.manual_seed(11)
        before = torch.random.get_rng_state()
        reports = [
            train(tmp_path / name, family=family, seed=seed, steps=3, n_test=8, progress=False)
            for name, seed in (("a", 5), ("b", 5), ("c", 6))
        ]
        assert torch.equal(torch.random.get_rng_state(), before)
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
        assert files[0] == files[1] != files[2]
        assert reports[0]["final_loss"] == reports[1]["final_loss"]
        model, tokenizer = (auto.from_pretrained(tmp_path / "a") for auto in (AutoModelForCausalLM, AutoTokenizer))
        assert type(model) is kind
        assert last_logits(model, torch.tensor([tokenizer("Then, John")["input_ids"]])).shape == (1, len(tokenizer))
        assert json.loads((tmp_path / "a" / "training.json").read_text()) == reports[0]

    @pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "n_test": 0}])
    def test_refuses_bad_arguments(self, tmp_path, wrong):
        with pytest.raises(ValueError, match="must be 1 or more"):
            train(tmp_path, progress=False, **wrong)

    def test_refuses_another_family(self, tmp_path):
        with pytest.raises(ValueError, match="family 'gpt2' cannot be trained; the families are mamba, mamba2"):
            train(tmp_path, family="gpt2", steps=1)

    def test_refuses_a_file_for_a_folder(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="is a file"):
            train(tmp_path / "file", steps=1)
