"""Sweeps of a model without scans: rows' own positions and metrics over the vocabulary, against hooks on the model."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mamba_ioi import PromptPairs
from mamba_ioi.experiments import resample_ablation
from mamba_ioi.models.model import wrap


def test_marks_and_a_metric_over_the_vocabulary() -> None:
    """Each row's own position, and probabilities among all tokens, by hooks, one row at a time."""
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    clean = torch.randint(0, 40, (3, 6))
    corrupt = clean.clone()
    corrupt[:, 1] = (clean[:, 1] + 1) % 40
    at = torch.tensor([1, 3, -1])
    answers = torch.tensor([4, 5, 6])
    pairs = PromptPairs(
        clean_tokens=clean, corrupt_tokens=corrupt, answers=answers, corrupt_answers=answers + 9, marks={"here": at}
    )
    model = wrap(module, None, model_id="gpt2")
    marks = ["here", "last"]
    table = resample_ablation(model, pairs, "resid_pre", [1], marks=marks, metric="prob_diff", progress=False).table
    block = module.transformer.h[1]

    def difference(tokens, position=None, value=None, keep=None):
        def hook(_, args):
            hidden = args[0].clone()
            if keep is not None:
                keep.append(hidden)
            if value is not None:
                hidden[:, position] = value
            return (hidden, *args[1:])

        handle = block.register_forward_pre_hook(hook)
        try:
            with torch.no_grad():
                return module(tokens[None]).logits[0, -1].softmax(-1)
        finally:
            handle.remove()

    for mark in marks:
        expected = []
        for row in range(3):
            position = int(at[row]) if mark == "here" else 5
            if position < 0:
                continue
            kept: list = []
            difference(corrupt[row], keep=kept)
            whole = difference(clean[row])
            patched = difference(clean[row], position, kept[0][:, position])
            right, wrong = int(answers[row]), int(answers[row]) + 9
            expected.append(float((whole[right] - whole[wrong]) - (patched[right] - patched[wrong])))
        found = table[table["mark"] == mark].iloc[0]
        assert found["n"] == len(expected)
        assert abs(found["effect"] - sum(expected) / len(expected)) < 1e-5
        assert abs(found["effect"]) > 1e-4
