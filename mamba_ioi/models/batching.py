"""What a trace's inputs become: texts as they stand, rows of different lengths padded on the right.

nnsight pads on the left, so that a position would be one token here and another in `cache` and `run`.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from torch._guards import detect_fake_mode


def model_input(model: TransformersModel, invokes: list, fn: Any) -> tuple:
    """The arguments that ``fn`` is called with for a trace's invokes, each a pair (inputs, keywords).

    What pads are tokens like any others, which no token before them sees, unless a mask is given. What generates is not
    padded. The tokenizer may be a server's, so the side on which it pads is neither used nor changed.

    Raises:
        ValueError: for an empty text, a text without a tokenizer, or prompts of different lengths to generate from.
    """
    if getattr(fn, "__name__", None) == "pipe":
        return _pipeline_input(model, invokes, fn)
    twin = model._shallow_copy()
    twin.tokenizer = SimpleNamespace(
        padding_side="right", pad_token_id=getattr(model.tokenizer, "pad_token_id", 0) or 0
    )
    args, kwargs = TransformersModel._batch(twin, [_as_it_stands(model, *invoke) for invoke in invokes], fn)
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or detect_fake_mode() is not None:
        return args, kwargs
    given = any("attention_mask" in keywords or "attention_mask" in _mapping(inputs) for inputs, keywords in invokes)
    if getattr(fn, "__name__", None) == "generate" and not (mask[:, -1] if given else mask).all():
        raise _padded(mask.sum(1).tolist())
    if not given:
        kwargs["attention_mask"] = torch.ones_like(mask)
    elif "position_ids" not in kwargs and not mask[:, 0].all():  # padded on the left by whoever gave the mask
        first = mask.long().argmax(1, keepdim=True)
        kwargs["position_ids"] = (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)
    return args, kwargs


def _as_it_stands(model: TransformersModel, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    """An invoke whose texts get no token in front, unless it asks for that."""
    data = inputs[0] if inputs else None
    texts = [data] if isinstance(data, str) else data
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        return inputs, keywords
    if model.tokenizer is None:
        raise ValueError(f"{model.model_id} has no tokenizer: pass token ids [B, L] instead of text")
    if not all(texts):
        raise ValueError("tokens are a LongTensor [B, L], a text, or a list of texts that are not empty")
    return inputs, {"add_special_tokens": False} | keywords


def _pipeline_input(model: TransformersModel, invokes: list, fn: Any) -> tuple:
    """The input of the pipeline, which tokenizes itself: prompts of different lengths run one after another."""
    args, kwargs = TransformersModel._batch(model, invokes, fn)
    if args and isinstance(args[0], list):
        lengths = [len(row) for row in model.tokenizer(args[0])["input_ids"]]
        if len(set(lengths)) > 1:
            if len(invokes) > 1:
                raise _padded(lengths)
            kwargs["batch_size"] = 1
    return args, kwargs


def _padded(lengths: Iterable[int]) -> ValueError:
    several = " and ".join(map(str, sorted(set(lengths))))
    return ValueError(f"what generates is not padded: give prompts of one length, not of {several} tokens")


def _mapping(inputs: tuple) -> Mapping:
    return inputs[0] if inputs and isinstance(inputs[0], Mapping) else {}
