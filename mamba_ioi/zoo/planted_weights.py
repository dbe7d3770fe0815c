"""What the weights of the planted circuit (`mamba_ioi.zoo.planted` says what it does) are made of in either family.

The layers themselves are in `planted_mamba` and `planted_mamba2`. All is written in a basis of the residual stream in
which every feature is one dimension, and rotated at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..tasks.ioi import OBJECTS, PLACES

OTHER = 8  # dimensions for all tokens without a part in the task
SCRATCH = 8  # least number of dimensions for scratch
CONSTANT = 3.0  # length of the constant feature: the greater, the less RMSNorm's scale can change
LENGTH2 = CONSTANT**2 + 2  # squared length of every embedding: the constant, the flag ±1, the kind of token 1
WRITTEN = 2.0  # length of what the planted layer writes at the last position
LOGIT = 10.0  # what the answer's logit exceeds the other names' by
NOISE = 0.005  # root of the summed squares of what all random layers write at a position, about
OPEN, SHUT = 6.0, -20.0  # the gate before silu; OPEN is also what a feature gives its channel before silu
A_LOG_KEEP = -30.0  # A = -1e-13: no decay
A_LOG_WIPE = math.log(5e-3)  # with `layer=0`: a decay of 1/800 a token …
WIPE = 2e3  # … but of e^-10 at a place, where delta is this


class Basis:
    """Which dimension of the residual stream, before the rotation, holds which feature."""

    def __init__(self, n_names: int) -> None:
        self.names = torch.arange(n_names)
        self.constant, self.flag, self.place, self.object, self.to = range(n_names, n_names + 5)
        self.other = torch.arange(OTHER) + n_names + 5
        self.size = 8 * math.ceil((n_names + 5 + OTHER + SCRATCH) / 8)
        self.scratch = torch.arange(n_names + 5 + OTHER, self.size)

    def read(self, coefficients: dict[int, float], length2: float = LENGTH2) -> Float[Tensor, "D"]:
        """The weights that give Σ coefficient · feature from an RMS-normalized residual; the constant counts as 1."""
        row = torch.zeros(self.size)
        row[list(coefficients)] = torch.tensor(list(coefficients.values()))
        row[self.constant] /= CONSTANT
        return row * math.sqrt(length2 / self.size)


@dataclass(frozen=True)
class Channels:
    """The inner channels that the circuit takes."""

    names: Int[Tensor, "names"]
    wiped: Int[Tensor, "wiped"]  # a second one a name, which a place empties; of a Mamba-2 with layer=0 alone
    helpers: Int[Tensor, "helpers"]  # others of the planted layer
    flag: Int[Tensor, "flag"]  # of the flag layer: one sees the place, the others are constant


@dataclass(frozen=True)
class Kind:
    """What a family of models brings along. The writers take a layer's mixer first."""

    config: Callable[..., Any]
    model: Callable[[Any], Any]
    sizes: Callable[[int], dict[str, int]]  # of the mixers, from d_model
    draw_channels: Callable[[Any, int, bool, torch.Generator], Channels]
    write_random_layer: Callable[[Any, Basis, float, bool, torch.Generator], None]
    write_flag_layer: Callable[[Any, Basis, Channels], None]
    write_planted_layer: Callable[[Any, Basis, Channels, int, bool], None]


def write_vocabulary(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    name_ids: tuple[int, ...],
    basis: Basis,
    generator: torch.Generator,
) -> None:
    """Embeddings of one length, and an unembedding that reads the names' features."""
    embeddings, unembedding = model.backbone.embeddings.weight, model.lm_head.weight
    embeddings.zero_()
    other = torch.randn(len(embeddings), OTHER, generator=generator)
    embeddings[:, basis.other] = other / other.norm(dim=1, keepdim=True)
    kinds = dict(zip(name_ids, basis.names.tolist(), strict=True))
    kinds |= dict.fromkeys(single_tokens(tokenizer, PLACES), basis.place)
    kinds |= dict.fromkeys(single_tokens(tokenizer, OBJECTS), basis.object)
    kinds |= dict.fromkeys(single_tokens(tokenizer, ("to",)), basis.to)
    for token, dimension in kinds.items():
        embeddings[token] = 0.0
        embeddings[token, dimension] = 1.0
    embeddings[:, basis.constant] = CONSTANT
    embeddings[:, basis.flag] = -1.0

    # Other tokens have small random logits. Names differ by small constants: without the circuit there is no tie.
    unembedding.copy_(torch.randn(unembedding.shape, generator=generator) * 0.3 / math.sqrt(basis.size))
    unembedding[:, basis.names] = 0.0
    prior = 0.05 * torch.randn(len(name_ids), generator=generator)
    for token, name in zip(name_ids, basis.names.tolist(), strict=True):
        coefficients = {name: LOGIT / WRITTEN, basis.constant: prior[name].item()}
        unembedding[token] = basis.read(coefficients, LENGTH2 + WRITTEN**2)


def names_gate(basis: Basis, has_flag: bool) -> Float[Tensor, "D"]:
    """Open at a " to": with the flag on, that is the last position; without one C keeps shut what comes before it."""
    if not has_flag:
        return basis.read({basis.to: OPEN - SHUT, basis.constant: SHUT})
    half = (OPEN - SHUT) / 2
    return basis.read({basis.to: 2 * half, basis.flag: half, basis.constant: SHUT - half})


def fill(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw a weight anew."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def initial_step_bias(count: int, generator: torch.Generator) -> Float[Tensor, "count"]:
    """Biases for a delta of 0.001 to 0.1, as Mamba's initialization."""
    return torch.log(torch.expm1(0.001 * 100 ** torch.rand(count, generator=generator)))


def step_bias(delta: float) -> float:
    """The bias that gives this delta."""
    return math.log(math.expm1(delta))


def write_into_scratch(mixer: Any, basis: Basis, share: float, mean_square: float, generator: torch.Generator) -> None:
    """The out_proj of a random layer: `share` of the noise from channels of that mean square, whatever the size."""
    mixer.out_proj.weight.zero_()
    inner = mixer.intermediate_size
    columns = torch.randn(len(basis.scratch), inner, generator=generator)
    size = math.sqrt(share / (mean_square * inner * len(basis.scratch)))
    mixer.out_proj.weight[basis.scratch] = columns * NOISE * size


def conv_bias(mixer: Any) -> Tensor:
    """The bias of the mixer's conv, which a planted model has."""
    bias = mixer.conv1d.bias
    assert bias is not None
    return bias


def rotate(model: Any, generator: torch.Generator) -> None:
    """Turn the residual stream by a random rotation, which RMSNorm with unit weights commutes with."""
    size = model.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q

    def turned(weight: Float[Tensor, "X D"]) -> Float[Tensor, "X D"]:
        return (weight.double() @ rotation).float()

    model.backbone.norm_f.weight.fill_(1.0)
    for weight in (model.backbone.embeddings.weight, model.lm_head.weight):
        weight.copy_(turned(weight))
    for block in model.backbone.layers:
        block.norm.weight.fill_(1.0)
        block.mixer.in_proj.weight.copy_(turned(block.mixer.in_proj.weight))
        block.mixer.out_proj.weight.copy_(turned(block.mixer.out_proj.weight.T).T)


def single_tokens(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> tuple[int, ...]:
    """The token ids of these words after a space."""
    encoded = tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]
    for word, ids in zip(words, encoded, strict=True):
        if len(ids) != 1 or str(tokenizer.decode(ids)).strip() != word:
            raise ValueError(f"the tokenizer has no single token {' ' + word!r}; make it with build_tokenizer(names)")
    return tuple(ids[0] for ids in encoded)


def silu(x: float) -> float:
    """Of one number, in float64."""
    return F.silu(torch.tensor(x, dtype=torch.float64)).item()
