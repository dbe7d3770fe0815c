"""One convention for texts: as they stand, padded on the right, the same tokens in a trace, `cache` and `run`."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from mamba_ioi import load_model
from mamba_ioi.interventions.patch import Patch
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.models.model import CausalLM, MambaModel, wrap

TEXTS = ["When John and Mary went to the shop, John gave the bag to", "Then Mary and Anna", "Anna and John had a long"]


@pytest.fixture(scope="module")
def tiny() -> MambaModel:
    return load_model("tiny")


@pytest.fixture(scope="module", params=["mamba", "gpt2"])
def model(request: pytest.FixtureRequest, tiny: MambaModel) -> CausalLM:
    if request.param == "mamba":
        return tiny
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tiny.vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return wrap(GPT2LMHeadModel(config).eval(), tiny.tokenizer, model_id="gpt2")


@pytest.fixture(scope="module")
def rows(tiny: MambaModel) -> list[list[int]]:
    """The texts' tokens."""
    found = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert len({len(row) for row in found}) == 3
    return found


@pytest.fixture(scope="module")
def alone(model: CausalLM, rows: list[list[int]]) -> list[torch.Tensor]:
    """Each text's logits, by transformers alone."""
    with torch.no_grad():
        return [model._module(torch.tensor([row]), use_cache=False).logits[0] for row in rows]


def forms(model: CausalLM, rows: list[list[int]]) -> dict:
    """What a trace can be given that comes to the same tokens."""
    encoding = model.tokenizer(TEXTS, return_tensors="pt", padding=True, add_special_tokens=False)
    return {
        "texts": TEXTS,
        "a tuple": tuple(TEXTS),
        "lists": rows,
        "tensors": [torch.tensor(row) for row in rows],
        "a mapping": {"input_ids": rows},
        "an encoding": encoding,
        "ids": encoding["input_ids"],
    }


@pytest.mark.parametrize("form", ["texts", "a tuple", "lists", "tensors", "a mapping", "an encoding", "ids"])
def test_each_row_is_as_it_is_alone(model: CausalLM, rows, alone, form: str) -> None:
    given = forms(model, rows)[form]
    with torch.no_grad(), model.trace(given):
        logits = model.lm_head.output.save()
    for row, expected in zip(logits, alone, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-4)


def test_several_invokes(model: CausalLM, rows, alone) -> None:
    found = {}
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(TEXTS[1]):
            found[1] = model.lm_head.output
        with tracer.invoke([TEXTS[0]]):
            found[0] = model.lm_head.output
        with tracer.invoke(torch.tensor(rows[2])):
            found[2] = model.lm_head.output
    for index, expected in enumerate(alone):
        torch.testing.assert_close(found[index][0, : len(expected)], expected, rtol=0, atol=1e-4)


def test_one_value_on_one_token(tiny: MambaModel) -> None:
    """What is cached at a position is what a trace of the same texts has there, pads included."""
    cached = cache(tiny, TEXTS, [("h", 2), ("ssm_input", 3), "logits"])
    with torch.no_grad(), tiny.trace(TEXTS):
        h = tiny.layers[2].mixer.h.save()
        x = tiny.layers[3].mixer.ssm_input.save()
        logits = tiny.logits.save()
    for found, site in ((h, ("h", 2)), (x, ("ssm_input", 3)), (logits, "logits")):
        torch.testing.assert_close(found, cached[site], rtol=0, atol=1e-4)

    value = cached["ssm_input", 3].flip(0)[:, 2:3]
    with torch.no_grad(), tiny.trace(TEXTS):
        tiny.layers[3].mixer.ssm_input[:, 2:3] = value
        patched = tiny.logits.save()
    expected = run(tiny, TEXTS, [Patch("ssm_input", 3, value, 2)], positions="all")
    torch.testing.assert_close(patched, expected, rtol=0, atol=1e-4)
    assert (expected - logits).abs().max() > 1e-2


def test_no_token_is_added(tiny: MambaModel) -> None:
    """A tokenizer that puts a token in front does so only where it is asked to."""
    tokenizer, bos = copy.deepcopy(tiny.tokenizer), tiny.tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    model = wrap(tiny._module, tokenizer, model_id="bos")
    with torch.no_grad(), model.trace("Then"):
        plain = model.backbone.input.save()
    assert plain.tolist() == model.to_tokens("Then")[0].tolist() == tiny.to_tokens("Then")[0].tolist()
    with torch.no_grad(), model.trace("Then", add_special_tokens=True):
        asked = model.backbone.input.save()
    assert asked[0].tolist() == [tokenizer.bos_token_id, *plain[0].tolist()]


def test_what_generates_is_not_padded(model: CausalLM, rows) -> None:
    encoding = model.tokenizer(TEXTS, return_tensors="pt", padding=True, add_special_tokens=False)
    for given in (TEXTS, rows, encoding):
        with pytest.raises(ValueError, match="what generates is not padded: give prompts of one length, not of"):
            model.generate(given, max_new_tokens=2)
    with pytest.raises(ValueError, match="what generates is not padded"), model.generate(max_new_tokens=2) as tracer:
        with tracer.invoke(TEXTS[0]):
            pass
        with tracer.invoke(TEXTS[1]):
            pass


def test_generation_of_one_length(model: CausalLM, rows) -> None:
    short = min(map(len, rows))
    prompts = torch.tensor([row[:short] for row in rows])
    with torch.no_grad():
        ids = prompts
        for _ in range(4):
            ids = torch.cat([ids, model._module(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompts, max_new_tokens=4, do_sample=False), ids)
    left = model.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    found = model.generate(left, max_new_tokens=4, do_sample=False)[:, -4:]  # padded by hand, and masked
    for row, text in zip(found, TEXTS, strict=True):
        assert torch.equal(row, model.generate(text, max_new_tokens=4, do_sample=False)[0, -4:])


def test_a_pipeline_of_texts(model: CausalLM) -> None:
    together = model.pipe(TEXTS, max_new_tokens=4, do_sample=False)
    assert together == [model.pipe(text, max_new_tokens=4, do_sample=False) for text in TEXTS]


def test_masks_that_are_given(model: CausalLM, alone) -> None:
    """Rows padded on the left by hand keep their positions, also beside longer ones."""
    left = model.tokenizer(TEXTS[1:], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    found = {}
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(left):
            found["left"] = model.lm_head.output
        with tracer.invoke(TEXTS[0]):
            found["right"] = model.lm_head.output
    width = left["input_ids"].shape[1]
    for row, expected in zip(found["left"], alone[1:], strict=True):
        torch.testing.assert_close(row[width - len(expected) : width], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["right"][0], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("given", ["", ["Then", ""]])
def test_empty_texts(tiny: MambaModel, given) -> None:
    for call in (lambda: tiny.trace(given, trace=False), lambda: run(tiny, given)):
        with pytest.raises(ValueError, match="texts that are not empty"):
            call()


def test_texts_without_a_tokenizer(small: MambaModel) -> None:
    with pytest.raises(ValueError, match="random has no tokenizer: pass token ids"):
        small.trace("Then", trace=False)
    with torch.no_grad(), small.trace([[1, 2, 3], [4, 5]]):
        logits = small.logits.save()
    torch.testing.assert_close(logits[1, 1], run(small, torch.tensor([[4, 5]]))[0], rtol=0, atol=1e-5)
