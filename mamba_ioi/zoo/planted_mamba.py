"""The planted circuit's layers in a Mamba (S6, arXiv 2312.00752): B, C and delta are read from what the conv gives."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

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

STEP = 0.25  # delta of the circuit's channels


def _draw_channels(mixer: MambaMixer, n_names: int, has_flag: bool, generator: torch.Generator) -> Channels:
    """Any channels. Beside the names' stand one that is constant and two that see the flag, or a place and a " to"."""
    channels = torch.randperm(mixer.intermediate_size, generator=generator)
    return Channels(channels[:n_names], channels[:0], channels[n_names : n_names + 3], channels[-2:])


def _write_random_layer(mixer: MambaMixer, basis: Basis, share: float, local: bool, generator: torch.Generator) -> None:
    """A random layer, `share` of all layers, that writes into the scratch space alone; `local`: it mixes no tokens."""
    size, inner, states, rank = (
        basis.size,
        mixer.intermediate_size,
        mixer.ssm_state_size,
        mixer.time_step_rank,
    )
    fill(mixer.in_proj.weight, size**-0.5, generator)
    fill(mixer.conv1d.weight, 0.5, generator)
    fill(conv_bias(mixer), 0.1, generator)
    fill(mixer.x_proj.weight, inner**-0.5, generator)
    fill(mixer.dt_proj.weight, rank**-0.5, generator)
    mixer.dt_proj.bias.copy_(initial_step_bias(inner, generator))
    mixer.A_log.copy_(torch.arange(1.0, states + 1).log().expand(inner, states))
    mixer.D.fill_(1.0)
    if local:
        mixer.conv1d.weight[:, :, :-1] = 0.0
        mixer.x_proj.weight[rank : rank + states] = 0.0
    write_into_scratch(mixer, basis, share, 0.02, generator)  # a channel's output has this mean square or so


def clear(mixer: MambaMixer, channels: Int[Tensor, "C"]) -> None:
    """Empty the channels that the circuit needs, let B, C and delta depend on nothing yet, and write nothing."""
    for weight in (
        mixer.in_proj.weight[: mixer.intermediate_size],
        mixer.in_proj.weight[mixer.intermediate_size :],
    ):
        weight[channels] = 0.0
    for parameter in (mixer.conv1d.weight, conv_bias(mixer), mixer.dt_proj.weight, mixer.D):
        parameter[channels] = 0.0
    mixer.x_proj.weight.zero_()
    mixer.dt_proj.bias[channels] = SHUT  # delta of 2e-9: nothing enters h
    mixer.A_log[channels] = A_LOG_KEEP
    mixer.out_proj.weight.zero_()


def _write_flag_layer(mixer: MambaMixer, basis: Basis, channels: Channels) -> None:
    """From the place word on, add 2 to the flag."""
    clear(mixer, channels.flag)
    place, constant = channels.flag.tolist()
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    mixer.in_proj.weight[place] = basis.read({basis.place: OPEN})
    mixer.conv1d.weight[place, 0, -1] = 1.0
    conv_bias(mixer)[constant] = OPEN
    mixer.dt_proj.bias[place] = step_bias(STEP)
    mixer.x_proj.weight[rank, constant] = 1 / (STEP * silu(OPEN) ** 2)  # B: a place adds 1 to h
    mixer.x_proj.weight[rank + states, constant] = 1 / silu(OPEN)  # C: 1
    mixer.in_proj.weight[inner + place] = basis.read({basis.constant: OPEN})
    mixer.out_proj.weight[basis.flag, place] = 2 / silu(OPEN)


def _write_planted_layer(mixer: MambaMixer, basis: Basis, channels: Channels, slice: int, has_flag: bool) -> None:
    """Names before the place less names after it, written at the last position onto the names' features."""
    names, (constant, first, second) = channels.names, channels.helpers.tolist()
    clear(mixer, torch.cat([channels.names, channels.helpers]))
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    in_proj, conv, x_proj = mixer.in_proj.weight, mixer.conv1d.weight, mixer.x_proj.weight
    for name, channel in zip(basis.names.tolist(), names.tolist(), strict=True):
        in_proj[channel] = basis.read({name: OPEN})
    conv[names, 0, slice - 1] = 1.0  # the last of the four taps is slice 0
    conv_bias(mixer)[constant] = OPEN
    mixer.dt_proj.bias[names] = step_bias(STEP)
    mixer.out_proj.weight[basis.names, names] = WRITTEN / silu(OPEN)
    unit = 1 / (STEP * silu(OPEN))  # B: a name adds 1 to h
    if has_flag:
        # silu(x) - silu(-x) = x: B is minus the flag, C is 1.
        in_proj[first], in_proj[second] = basis.read({basis.flag: 1.0}), basis.read({basis.flag: -1.0})
        conv[[first, second], 0, -1] = 1.0
        x_proj[rank, first], x_proj[rank, second] = -unit, unit
        x_proj[rank + states, constant] = 1 / silu(OPEN)
    else:
        # `first` sees a place: B is 1 but 0 there, delta is WIPE there. `second` sees " to" after an object: C.
        in_proj[first] = basis.read({basis.place: OPEN})
        conv[first, 0, -1] = 1.0
        x_proj[rank : rank + 2, constant] = unit / silu(OPEN)
        x_proj[rank : rank + 2, first] = -unit / silu(OPEN)
        x_proj[0, first] = WIPE / silu(OPEN)
        mixer.dt_proj.weight[:, 0] = 0.0
        mixer.dt_proj.weight[names, 0] = 1.0
        mixer.A_log[names, 1] = A_LOG_WIPE
        in_proj[second] = basis.read({basis.to: -2 * SHUT, basis.object: -2 * SHUT})
        conv[second, 0, -2:] = 1.0
        conv_bias(mixer)[second] = 3 * SHUT
        x_proj[rank + states, second], x_proj[rank + states + 1, second] = 1 / silu(-SHUT), -2 / silu(-SHUT)
    in_proj[inner + names] = names_gate(basis, has_flag)


MAMBA = Kind(
    MambaConfig,
    MambaForCausalLM,
    lambda d_model: {},
    _draw_channels,
    _write_random_layer,
    _write_flag_layer,
    _write_planted_layer,
)
