"""The planted circuit's layers in a Mamba-2 (SSD, arXiv 2405.21060): heads, groups, and a norm after the gate.

Beside what differs by its nature (B and C come out of the conv, delta out of in_proj, A is one number a head):

- The gated RMSNorm would scale whatever the circuit writes by how much there is of it. So one more channel of each
  group, the ballast, holds ten times what a name makes; next to it the rest hardly matters. It is alike in the groups:
  a norm over all channels (transformers before 5.24) and one over each group (since) do the same. All channels of the
  two layers that the circuit does not use are shut by their gates.
- A name's own flag enters B through the same slice of the conv as the name. silu takes that of B to 0.278 (before the
  place) or to silu's least value, -0.278 (after it).
- With `layer=0` a name has two channels, in heads of different groups, since a head has one decay for all its states.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from .planted_weights import (
    A_LOG_KEEP,
    A_LOG_WIPE,
    OPEN,
    SHUT,
    WIPE,
    WRITTEN,
    Basis,
    Channels,
    Kind,
    conv_bias,
    fill,
    initial_step_bias,
    names_gate,
    silu,
    step_bias,
    write_into_scratch,
)

HEAD_DIM, GROUPS, STATES, CHUNK = 8, 2, 16, 32
BALLAST = 10.0  # what the ballast is of what a name makes, after the gate
LEAST_AT = 1.2784645427610738  # silu(-LEAST_AT) = 1 - LEAST_AT is its least value; silu(LEAST_AT) = 1
AS_MUCH_AT = 0.4551154164653932  # silu(AS_MUCH_AT) = LEAST_AT - 1


class _Rows:
    """The parts of in_proj, views [rows, D], and which of the conv's channels are state 0 of B and C.

    Those of the groups of the channels given: in no other group does anything enter h.
    """

    def __init__(self, mixer: Mamba2Mixer, channels: Int[Tensor, "C"]) -> None:
        inner, both = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
        self.gate, self.conv, self.dt = mixer.in_proj.weight.split([inner, inner + 2 * both, mixer.num_heads])
        groups = (channels // (inner // mixer.n_groups)).unique()
        self.B = inner + groups * mixer.ssm_state_size
        self.C = self.B + both


def _sizes(d_model: int) -> dict[str, int]:
    return {
        "head_dim": HEAD_DIM,
        "num_heads": 2 * d_model // HEAD_DIM,
        "n_groups": GROUPS,
        "state_size": STATES,
        "chunk_size": CHUNK,
    }


def _draw_channels(mixer: Mamba2Mixer, n_names: int, has_flag: bool, generator: torch.Generator) -> Channels:
    """The names' channels in heads of one group, those that a place empties in heads of the other."""
    each = mixer.num_heads // mixer.n_groups
    needed = math.ceil(n_names / mixer.head_dim)

    def some(heads: Int[Tensor, "heads"]) -> Int[Tensor, "channels"]:
        """The channels of these heads in random order."""
        channels = (heads[:, None] * mixer.head_dim + torch.arange(mixer.head_dim)).flatten()
        return channels[torch.randperm(len(channels), generator=generator)]

    groups = torch.randperm(mixer.n_groups, generator=generator).tolist()
    one, other = (group * each + torch.randperm(each, generator=generator) for group in groups[:2])
    names, wiped = some(one[:needed])[:n_names], some(other[:needed])[: 0 if has_flag else n_names]
    place, ballast = some(one[-1:])[:1], torch.cat([some(heads)[:1] for heads in (one[-2:-1], other[-1:])])
    return Channels(names, wiped, ballast, torch.cat([place, ballast]))


def _write_random_layer(
    mixer: Mamba2Mixer, basis: Basis, share: float, local: bool, generator: torch.Generator
) -> None:
    """A random layer, `share` of all layers, that writes into the scratch space alone; `local`: it mixes no tokens."""
    fill(mixer.in_proj.weight, basis.size**-0.5, generator)
    fill(mixer.conv1d.weight, 0.5, generator)
    fill(conv_bias(mixer), 0.1, generator)
    mixer.dt_bias.copy_(initial_step_bias(mixer.num_heads, generator))
    mixer.A_log.copy_(torch.arange(1.0, mixer.num_heads + 1).log())
    mixer.D.fill_(1.0)
    mixer.norm.weight.copy_(0.5 + torch.rand(mixer.intermediate_size, generator=generator))
    if local:
        mixer.conv1d.weight[:, :, :-1] = 0.0
        inner, both = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
        for weight in (mixer.conv1d.weight, conv_bias(mixer)):
            weight[inner : inner + both] = 0.0
    write_into_scratch(mixer, basis, share, 1.0, generator)  # the norm leaves a mean square of 1, about


def _clear(mixer: Mamba2Mixer, basis: Basis, channels: Int[Tensor, "C"], ballast: Int[Tensor, "G"]) -> _Rows:
    """Empty B and C and the heads of the channels and the ballast, shut all gates, and write nothing."""
    rows, inner = _Rows(mixer, channels), mixer.intermediate_size
    heads = torch.cat([channels, ballast]) // mixer.head_dim
    emptied = torch.cat(
        [torch.arange(inner).view(-1, mixer.head_dim)[heads].flatten(), torch.arange(inner, len(rows.conv))]
    )
    for weight in (rows.conv, mixer.conv1d.weight, conv_bias(mixer)):
        weight[emptied] = 0.0
    rows.gate.copy_(basis.read({basis.constant: SHUT}).expand(inner, -1))
    for weight in (rows.dt, mixer.D):
        weight[heads] = 0.0
    mixer.dt_bias[heads] = SHUT  # delta of 2e-9: nothing enters h
    mixer.A_log[heads] = A_LOG_KEEP
    mixer.out_proj.weight.zero_()
    return rows


def _write_out(
    mixer: Mamba2Mixer, rows: _Rows, basis: Basis, ballast: Int[Tensor, "G"], made: float, count: int
) -> Float[Tensor, "E"]:
    """Write the ballast. What out_proj must be so that a channel writes 1 where `count` channels make `made`."""
    size = BALLAST * made
    conv_bias(mixer)[ballast] = OPEN
    rows.gate[ballast] = basis.read({basis.constant: OPEN})
    mixer.D[ballast // mixer.head_dim] = size / silu(OPEN) ** 2
    mean_square = (len(ballast) * size**2 + count * made**2) / mixer.intermediate_size
    return math.sqrt(mean_square + mixer.norm.variance_epsilon) / (made * mixer.norm.weight)


def _write_flag_layer(mixer: Mamba2Mixer, basis: Basis, channels: Channels) -> None:
    """From the place word on, add 2 to the flag."""
    place, ballast = int(channels.flag[0]), channels.flag[1:]
    rows = _clear(mixer, basis, channels.flag[:1], ballast)
    rows.conv[place] = basis.read({basis.place: OPEN})
    mixer.conv1d.weight[place, 0, -1] = 1.0
    conv_bias(mixer)[torch.cat([rows.B, rows.C])] = LEAST_AT  # B and C: 1
    mixer.dt_bias[place // mixer.head_dim] = step_bias(1 / silu(OPEN))  # a place adds 1 to h
    rows.gate[place] = basis.read({basis.constant: OPEN})
    one = _write_out(mixer, rows, basis, ballast, silu(OPEN), 1)
    mixer.out_proj.weight[basis.flag, place] = 2 * one[place]


def _write_planted_layer(mixer: Mamba2Mixer, basis: Basis, channels: Channels, slice: int, has_flag: bool) -> None:
    """Names before the place less names after it, written at the last position onto the names' features."""
    ballast = channels.helpers
    rows = _clear(mixer, basis, torch.cat([channels.names, channels.wiped]), ballast)
    conv, bias = mixer.conv1d.weight[:, 0], conv_bias(mixer)
    tap = slice - 1  # the last of the four taps is slice 0
    if has_flag:
        unit, made, count = LEAST_AT - 1, silu(OPEN), 1
        half = (AS_MUCH_AT + LEAST_AT) / 2
        rows.conv[rows.B] = basis.read({basis.flag: -half})
        conv[rows.B, tap] = 1.0
        bias[rows.B] = (AS_MUCH_AT - LEAST_AT) / 2
        bias[rows.C] = LEAST_AT
    else:
        # B is 1 but 0 at a place, C is not 0 at a " to" after an object alone.
        unit, made, count = 1.0, silu(-SHUT) * silu(OPEN), 11  # names count 1, 2 and 2 in all, 1 and 1 after the place
        rows.conv[rows.B] = basis.read({basis.place: -LEAST_AT})
        conv[rows.B, -1] = 1.0
        bias[rows.B] = LEAST_AT
        rows.conv[rows.C] = basis.read({basis.to: -2 * SHUT, basis.object: -2 * SHUT})
        conv[rows.C, -2:] = 1.0
        bias[rows.C] = 3 * SHUT
    one = _write_out(mixer, rows, basis, ballast, made, count)
    for taken, share in ((channels.names, 1), (channels.wiped, -2)):
        heads, into = taken // mixer.head_dim, basis.names[: len(taken)]
        for name, channel in zip(into.tolist(), taken.tolist(), strict=True):
            rows.conv[channel] = basis.read({name: OPEN})
        conv[taken, tap] = 1.0
        mixer.dt_bias[heads] = step_bias(1 / (unit * silu(OPEN)))  # a name adds 1 to h
        rows.gate[taken] = names_gate(basis, has_flag)
        mixer.out_proj.weight[into, taken] = share * WRITTEN * one[taken]
    wiped = channels.wiped // mixer.head_dim
    rows.dt[wiped] = basis.read({basis.place: WIPE})
    mixer.A_log[wiped] = A_LOG_WIPE


MAMBA2 = Kind(
    Mamba2Config,
    Mamba2ForCausalLM,
    _sizes,
    _draw_channels,
    _write_random_layer,
    _write_flag_layer,
    _write_planted_layer,
)
