"""The weights of the planted circuit (`mamba_ioi.zoo.planted` says what it does): features, and each kind of layer.

All is written in a basis of the residual stream in which every feature is one dimension, and rotated at the end.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import MambaForCausalLM, PreTrainedTokenizerBase
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

from ..tasks.ioi import OBJECTS, PLACES

OTHER = 8  # dimensions for all tokens without a part in the task
SCRATCH = 8  # least number of dimensions for scratch
CONSTANT = 3.0  # length of the constant feature: the greater, the less RMSNorm's scale can change
LENGTH2 = CONSTANT**2 + 2  # squared length of every embedding: the constant, the flag ±1, the kind of token 1
WRITTEN = 2.0  # length of what the planted layer writes at the last position
LOGIT = 10.0  # what the answer's logit exceeds the other names' by
NOISE = 0.005  # root of the summed squares of what all random layers write at a position, about
STEP = 0.25  # delta of the circuit's channels
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


def write_vocabulary(
    model: MambaForCausalLM,
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


def write_random_layer(mixer: MambaMixer, basis: Basis, share: float, local: bool, generator: torch.Generator) -> None:
    """A random layer, `share` of all layers, that writes into the scratch space alone; `local`: it mixes no tokens."""

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    size, inner, states, rank = (
        basis.size,
        mixer.intermediate_size,
        mixer.ssm_state_size,
        mixer.time_step_rank,
    )
    normal(mixer.in_proj.weight, size**-0.5)
    normal(mixer.conv1d.weight, 0.5)
    normal(_conv_bias(mixer), 0.1)
    normal(mixer.x_proj.weight, inner**-0.5)
    normal(mixer.dt_proj.weight, rank**-0.5)
    delta = 0.001 * 100 ** torch.rand(inner, generator=generator)  # 0.001 … 0.1, as Mamba's initialization
    mixer.dt_proj.bias.copy_(torch.log(torch.expm1(delta)))
    mixer.A_log.copy_(torch.arange(1.0, states + 1).log().expand(inner, states))
    mixer.D.fill_(1.0)
    if local:
        mixer.conv1d.weight[:, :, :-1] = 0.0
        mixer.x_proj.weight[rank : rank + states] = 0.0
    mixer.out_proj.weight.zero_()
    # A channel's output has mean square 0.02 or so, whatever the size.
    columns = torch.randn(len(basis.scratch), inner, generator=generator)
    mixer.out_proj.weight[basis.scratch] = columns * NOISE * math.sqrt(share / (0.02 * inner * len(basis.scratch)))


def _conv_bias(mixer: MambaMixer) -> Tensor:
    """The bias of the mixer's conv, which a planted model has."""
    bias = mixer.conv1d.bias
    assert bias is not None
    return bias


def _clear(mixer: MambaMixer, channels: Int[Tensor, "C"]) -> None:
    """Empty the channels that the circuit needs, let B, C and delta depend on nothing yet, and write nothing."""
    for weight in (
        mixer.in_proj.weight[: mixer.intermediate_size],
        mixer.in_proj.weight[mixer.intermediate_size :],
    ):
        weight[channels] = 0.0
    for parameter in (mixer.conv1d.weight, _conv_bias(mixer), mixer.dt_proj.weight, mixer.D):
        parameter[channels] = 0.0
    mixer.x_proj.weight.zero_()
    mixer.dt_proj.bias[channels] = SHUT  # delta of 2e-9: nothing enters h
    mixer.A_log[channels] = A_LOG_KEEP
    mixer.out_proj.weight.zero_()


def write_flag_layer(mixer: MambaMixer, basis: Basis, channels: Int[Tensor, "2"]) -> None:
    """From the place word on, add 2 to the flag."""
    _clear(mixer, channels)
    place, constant = channels.tolist()
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    mixer.in_proj.weight[place] = basis.read({basis.place: OPEN})
    mixer.conv1d.weight[place, 0, -1] = 1.0
    _conv_bias(mixer)[constant] = OPEN
    mixer.dt_proj.bias[place] = math.log(math.expm1(STEP))
    mixer.x_proj.weight[rank, constant] = 1 / (STEP * _silu(OPEN) ** 2)  # B: a place adds 1 to h
    mixer.x_proj.weight[rank + states, constant] = 1 / _silu(OPEN)  # C: 1
    mixer.in_proj.weight[inner + place] = basis.read({basis.constant: OPEN})
    mixer.out_proj.weight[basis.flag, place] = 2 / _silu(OPEN)


def write_planted_layer(
    mixer: MambaMixer, basis: Basis, channels: Int[Tensor, "E"], slice: int, *, has_flag: bool
) -> None:
    """Names before the place less names after it, written at the last position onto the names' features."""
    n_names = len(basis.names)
    names, (constant, first, second) = channels[:n_names], channels[n_names : n_names + 3].tolist()
    _clear(mixer, channels[: n_names + 3])
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    in_proj, conv, x_proj = mixer.in_proj.weight, mixer.conv1d.weight, mixer.x_proj.weight
    for name, channel in zip(basis.names.tolist(), names.tolist(), strict=True):
        in_proj[channel] = basis.read({name: OPEN})
    conv[names, 0, slice - 1] = 1.0  # the last of the four taps is slice 0
    _conv_bias(mixer)[constant] = OPEN
    mixer.dt_proj.bias[names] = math.log(math.expm1(STEP))
    mixer.out_proj.weight[basis.names, names] = WRITTEN / _silu(OPEN)
    unit = 1 / (STEP * _silu(OPEN))  # B: a name adds 1 to h
    if has_flag:
        # silu(x) - silu(-x) = x: B is minus the flag, C is 1, the gate wants " to" and the flag.
        in_proj[first], in_proj[second] = basis.read({basis.flag: 1.0}), basis.read({basis.flag: -1.0})
        conv[[first, second], 0, -1] = 1.0
        x_proj[rank, first], x_proj[rank, second] = -unit, unit
        x_proj[rank + states, constant] = 1 / _silu(OPEN)
        half = (OPEN - SHUT) / 2
        gate = {basis.to: 2 * half, basis.flag: half, basis.constant: SHUT - half}
    else:
        # `first` sees a place: B is 1 but 0 there, delta is WIPE there. `second` sees " to" after an object: C.
        in_proj[first] = basis.read({basis.place: OPEN})
        conv[first, 0, -1] = 1.0
        x_proj[rank : rank + 2, constant] = unit / _silu(OPEN)
        x_proj[rank : rank + 2, first] = -unit / _silu(OPEN)
        x_proj[0, first] = WIPE / _silu(OPEN)
        mixer.dt_proj.weight[:, 0] = 0.0
        mixer.dt_proj.weight[names, 0] = 1.0
        mixer.A_log[names, 1] = A_LOG_WIPE
        in_proj[second] = basis.read({basis.to: -2 * SHUT, basis.object: -2 * SHUT})
        conv[second, 0, -2:] = 1.0
        _conv_bias(mixer)[second] = 3 * SHUT
        x_proj[rank + states, second], x_proj[rank + states + 1, second] = 1 / _silu(-SHUT), -2 / _silu(-SHUT)
        gate = {basis.to: OPEN - SHUT, basis.constant: SHUT}
    in_proj[inner + names] = basis.read(gate)


def rotate(model: MambaForCausalLM, generator: torch.Generator) -> None:
    """Turn the residual stream by a random rotation, which RMSNorm with unit weights commutes with."""
    size = model.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q

    def turned(weight: Float[Tensor, "X D"]) -> Float[Tensor, "X D"]:
        return (weight.double() @ rotation).float()

    model.backbone.norm_f.weight.fill_(1.0)
    for weight in (model.backbone.embeddings.weight, model.lm_head.weight):
        weight.copy_(turned(weight))
    for block in model.backbone.layers:
        assert isinstance(block, MambaBlock)
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


def _silu(x: float) -> float:
    return F.silu(torch.tensor(x, dtype=torch.float64)).item()
