"""`planted`: a Mamba with a circuit for indirect object identification written into its weights, the known answer.

Nothing is trained. The residual stream holds orthogonal features, in a basis turned by a random rotation: one for each
name, a constant, a flag, one each for place words, object words and " to", a few for all other tokens, and a scratch
space. Every token's embedding has the same length, so RMSNorm is one fixed scale.

- The flag layer (before the planted layer) turns the flag from -1 to +1 at the place word, for the rest of the prompt:
  its SSM, which does not decay, counts place words.
- The planted layer has one inner channel a name. The conv takes the name from one slice only, so it arrives `-slice`
  positions after its token. B is minus the flag: the SSM, which does not decay, adds a name to h before the place and
  subtracts it after, so that of three names, two of them repeated, the answer is left. The gate opens at a " to" with
  the flag on, the last token, and out_proj writes what h holds onto the names' features, which the unembedding reads.
- With `layer=0` no layer stands before the planted one, and it does without a flag: of two states a name, the first
  counts it in the whole prompt, the second is wiped at the place by a large delta, and C reads first - 2 * second. C
  is zero but at a " to" after an object, and the gate but at " to".
- All other layers are random Mamba layers (half of them without token mixing) which read everything, but write into the
  scratch space alone, which the circuit does not read. They touch it by RMSNorm's scale only.
"""

from __future__ import annotations

import math
import operator
import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase
from transformers.models.mamba.modeling_mamba import MambaMixer

from mamba_ioi.dataset import NAMES, OBJECTS, PLACES

__all__ = ["Planted", "build_planted", "planted_names"]

NAME_POSITIONS, LAST_POSITION = (3, 5, 7, 13, 15), 19  # in the aligned templates
SLICES = (-3, -2, -1, 0)
OTHER, SCRATCH = 8, 8  # dimensions for the tokens without a part in the task, and the least number for scratch
LENGTH2 = 3.0  # squared length of every embedding: constant, flag and kind of token, one each
WRITTEN = 2.0  # length of what the planted layer writes at the last position
LOGIT = 10.0  # what the answer's logit exceeds the other names' by
NOISE = 0.05  # root of the summed squares of what all random layers write at a position
STEP = 0.25  # delta of the circuit's channels
OPEN, SHUT = 6.0, -20.0  # the gate before silu
A_LOG_KEEP = -30.0  # A = -1e-13: no decay
A_LOG_WIPE = math.log(1e-3)  # with `layer=0`: half a percent of decay over a prompt …
WIPE = 2e4  # … but e^-20 at a place, where delta is this


@dataclass(frozen=True)
class Planted:
    """What is true of a planted model, by its construction. Slots are 1 … 5; positions are of the aligned templates.

    "Matters" is meant of resample ablation, clean and corrupt being a pair of `IOIDataset`: effect (1 - NLD) 1, where
    it is 0 (below 1e-3) for all else. The two prompts of a pair differ in one name slot; the flag, the gate, B and C are
    the same in both.

    Attributes:
        n_layers: Number of layers.
        layer: The planted layer.
        slice: The conv slice, 0 to -3, by which names enter it.
        seed: Seed of the names, the rotation, the channels, the flag layer and the random layers.
        flag_layer: The layer that sets the flag; None if `layer` is 0.
        names: The names the model knows, each one token after a space.
        name_ids: Their token ids, in the same order.
        name_positions: Where the five names stand: where `layer_input`, `normalized_input` and `in_proj` of the
            planted layer matter (at the slot that differs). Edges from embed matter here.
        arrival_positions: Where they enter h, `-slice` later: where `conv`, the conv slice (as output position), and
            `ssm_input` matter. `h` matters from here (of the slot that differs) to the last position.
        written_positions: The last position: where `y` … `out_proj` of the planted layer matter.
        name_channels: For each name its inner channel e of the planted layer. h[e, 0] is +1 for each time the name
            has arrived before the place, -1 for each after it. (`layer=0`: h[e, 0] - 2 * h[e, 1] is.)
        cross_talk: The layers whose token mixing matters, the minimal cross-talk set: the planted layer.
        local_layers: The layers in which no token reaches another position at all (one conv tap, B = 0).
        needed_layers: The layers whose removal (zero ablation) leaves accuracy at chance: flag and planted layer. The
            removal of any other changes no answer.
        edges: The edges that matter, alone and together: resampling all other edges changes nothing.
        fine_edges: The same with the planted layer's nodes: one conv slice and the SSM. Its skip does not matter.
        flag_edges: The edges that carry the flag: they matter under zero ablation, but not when resampled.
        replace_succeeds: The (source slot, target slot) of name steering by replacement that succeed on every prompt;
            the others fail on every prompt. The source's flag comes with the name, so it must be the target's.
        subtract_add_succeeds: The same for subtract-and-add, where the flag cancels: all pairs.
    """

    n_layers: int
    layer: int
    slice: int
    seed: int
    flag_layer: int | None
    names: tuple[str, ...]
    name_ids: tuple[int, ...]
    name_positions: tuple[int, ...]
    arrival_positions: tuple[int, ...]
    written_positions: tuple[int, ...]
    name_channels: tuple[int, ...]
    cross_talk: tuple[int, ...]
    local_layers: tuple[int, ...]
    needed_layers: tuple[int, ...]
    edges: tuple[tuple[str, str], ...]
    fine_edges: tuple[tuple[str, str], ...]
    flag_edges: tuple[tuple[str, str], ...]
    replace_succeeds: frozenset[tuple[int, int]]
    subtract_add_succeeds: frozenset[tuple[int, int]]


def planted_names(n_names: int = 24, seed: int = 0) -> tuple[str, ...]:
    """The names of `build_planted(..., n_names=n_names, seed=seed)`, for which its tokenizer is to be made.

    Drawn from `NAMES`, but for those that begin another.

    Raises:
        ValueError: If `n_names` is below 4 or more than there are, or `seed` is negative.
    """
    usable = [name for name in NAMES if not any(other != name and other.startswith(name) for other in NAMES)]
    n_names = _whole_number(n_names, "n_names", 4, len(usable))
    rng = random.Random(_whole_number(seed, "seed", 0, 2**63 - 1))
    return tuple(usable.pop(int(rng.random() * len(usable))) for _ in range(n_names))


def build_planted(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_layers: int = 6,
    layer: int = 3,
    slice: int = -1,
    n_names: int = 24,
    seed: int = 0,
) -> tuple[MambaForCausalLM, Planted]:
    """A Mamba that solves IOI by a known circuit, and what that circuit is.

    The same arguments give the same weights, bit by bit; no global random state is read or changed.

    Args:
        tokenizer: Must have as single tokens " to", the places, the objects and `planted_names(n_names, seed)`.
        n_layers: Number of layers, at least 1.
        layer: The planted layer, 0 to n_layers - 1. With 0 the circuit has no flag layer.
        slice: The conv slice by which names enter, 0, -1, -2 or -3.
        n_names: How many names the model knows, at least 4.
        seed: 0 or more.

    Returns:
        The model (float32, eval mode, embeddings not tied; d_model is n_names + 21 rounded up to 8, d_inner twice
        that, d_state 16, d_conv 4) and the `Planted` that describes it.

    Raises:
        ValueError: If an argument is out of range or the tokenizer splits one of the words.
    """
    n_layers = _whole_number(n_layers, "n_layers", 1, None)
    layer = _whole_number(layer, "layer", 0, n_layers - 1)
    slice = _whole_number(slice, "slice", min(SLICES), max(SLICES))
    names = planted_names(n_names, seed)
    rng = random.Random(f"layers {seed}")
    flag_layer = int(rng.random() * layer) if layer else None
    needed = (layer,) if flag_layer is None else (flag_layer, layer)
    local = tuple(i for i in range(n_layers) if rng.random() < 0.5 and i not in needed)

    generator = torch.Generator().manual_seed(seed)
    basis = _Basis(len(names))
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=basis.size,
        num_hidden_layers=n_layers,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = MambaForCausalLM(config).eval()
    name_ids = _single_tokens(tokenizer, names)
    with torch.no_grad():
        _write_vocabulary(model, tokenizer, name_ids, basis, generator)
        for i, block in enumerate(model.backbone.layers):
            _write_random(block.mixer, basis, NOISE / math.sqrt(n_layers), i in local, generator)
        channels = torch.randperm(config.intermediate_size, generator=generator)
        if flag_layer is not None:
            _write_flag_layer(model.backbone.layers[flag_layer].mixer, basis, channels[-2:])
        _write_planted_layer(model.backbone.layers[layer].mixer, basis, channels, slice, has_flag=layer > 0)
        _rotate(model, generator)
    return model, _truth(n_layers, layer, slice, seed, flag_layer, local, names, name_ids, channels)


class _Basis:
    """Which dimension of the residual stream, before the rotation, holds which feature."""

    def __init__(self, n_names: int) -> None:
        self.names = torch.arange(n_names)
        self.constant, self.flag, self.place, self.object, self.to = range(n_names, n_names + 5)
        self.other = torch.arange(OTHER) + n_names + 5
        self.size = 8 * math.ceil((n_names + 5 + OTHER + SCRATCH) / 8)
        self.scratch = torch.arange(n_names + 5 + OTHER, self.size)

    def read(self, coefficients: dict[int, float], length2: float = LENGTH2) -> Float[Tensor, "D"]:
        """The row of weights that gives Σ coefficient · feature from an RMS-normalized residual of that length."""
        row = torch.zeros(self.size)
        row[list(coefficients)] = torch.tensor(list(coefficients.values()))
        return row * math.sqrt(length2 / self.size)


def _write_vocabulary(
    model: MambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name_ids: tuple[int, ...],
    basis: _Basis,
    generator: torch.Generator,
) -> None:
    """Embeddings of one length, and an unembedding that reads the names' features."""
    embeddings, unembedding = model.backbone.embeddings.weight, model.lm_head.weight
    embeddings.zero_()
    other = torch.randn(len(embeddings), OTHER, generator=generator)
    embeddings[:, basis.other] = other / other.norm(dim=1, keepdim=True)
    kinds = dict(zip(name_ids, basis.names.tolist(), strict=True))
    kinds |= dict.fromkeys(_single_tokens(tokenizer, PLACES), basis.place)
    kinds |= dict.fromkeys(_single_tokens(tokenizer, OBJECTS), basis.object)
    kinds |= dict.fromkeys(_single_tokens(tokenizer, ("to",)), basis.to)
    for token, dimension in kinds.items():
        embeddings[token] = 0.0
        embeddings[token, dimension] = 1.0
    embeddings[:, basis.constant] = 1.0
    embeddings[:, basis.flag] = -1.0

    # Other tokens have small random logits. Names differ by a small constant, so that removing the circuit leaves no tie.
    unembedding.copy_(torch.randn(unembedding.shape, generator=generator) * 0.3 / math.sqrt(basis.size))
    unembedding[:, basis.names] = 0.0
    prior = 0.05 * torch.randn(len(name_ids), generator=generator)
    for token, name in zip(name_ids, basis.names.tolist(), strict=True):
        coefficients = {name: LOGIT / WRITTEN, basis.constant: prior[name].item()}
        unembedding[token] = basis.read(coefficients, LENGTH2 + WRITTEN**2)


def _write_random(
    mixer: MambaMixer, basis: _Basis, amount: float, local: bool, generator: torch.Generator
) -> None:
    """A random layer that writes about `amount` (root of the sum of squares) into the scratch space at each position."""

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    size, inner, states, rank = basis.size, mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
    normal(mixer.in_proj.weight, size**-0.5)
    normal(mixer.conv1d.weight, 0.5)
    normal(mixer.conv1d.bias, 0.1)
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
    mixer.out_proj.weight[basis.scratch] = columns * amount / math.sqrt(0.02 * inner * len(basis.scratch))


def _clear(mixer: MambaMixer, channels: Int[Tensor, "C"]) -> None:
    """Empty the channels that the circuit needs, and let B, C and delta depend on nothing yet."""
    for weight in (mixer.in_proj.weight[: mixer.intermediate_size], mixer.in_proj.weight[mixer.intermediate_size :]):
        weight[channels] = 0.0
    for parameter in (mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_proj.weight, mixer.D):
        parameter[channels] = 0.0
    mixer.x_proj.weight.zero_()
    mixer.dt_proj.bias[channels] = SHUT  # delta of 2e-9: nothing enters h
    mixer.A_log[channels] = A_LOG_KEEP
    mixer.out_proj.weight[:, channels] = 0.0


def _write_flag_layer(mixer: MambaMixer, basis: _Basis, channels: Int[Tensor, "2"]) -> None:
    """From the place word on, add 2 to the flag."""
    _clear(mixer, channels)
    place, constant = channels.tolist()
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    mixer.in_proj.weight[place] = basis.read({basis.place: OPEN})
    mixer.conv1d.weight[place, 0, -1] = 1.0
    mixer.conv1d.bias[constant] = OPEN
    mixer.dt_proj.bias[place] = math.log(math.expm1(STEP))
    mixer.x_proj.weight[rank, constant] = 1 / (STEP * _silu(OPEN) ** 2)  # B: a place adds 1 to h
    mixer.x_proj.weight[rank + states, constant] = 1 / _silu(OPEN)  # C: 1
    mixer.in_proj.weight[inner + place] = basis.read({basis.constant: OPEN})
    mixer.out_proj.weight[basis.flag, place] = 2 / _silu(OPEN)


def _write_planted_layer(
    mixer: MambaMixer, basis: _Basis, channels: Int[Tensor, "E"], slice: int, *, has_flag: bool
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
    mixer.conv1d.bias[constant] = OPEN
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
        mixer.conv1d.bias[second] = 3 * SHUT
        x_proj[rank + states, second], x_proj[rank + states + 1, second] = 1 / _silu(-SHUT), -2 / _silu(-SHUT)
        gate = {basis.to: OPEN - SHUT, basis.constant: SHUT}
    in_proj[inner + names] = basis.read(gate)


def _rotate(model: MambaForCausalLM, generator: torch.Generator) -> None:
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


def _truth(
    n_layers: int,
    layer: int,
    slice: int,
    seed: int,
    flag_layer: int | None,
    local_layers: tuple[int, ...],
    names: tuple[str, ...],
    name_ids: tuple[int, ...],
    channels: Int[Tensor, "E"],
) -> Planted:
    node, conv, ssm = str(layer), f"{layer}.conv[{slice}]", f"{layer}.ssm"
    slots = range(1, 6)
    every_pair = frozenset((source, target) for source in slots for target in slots)
    same_side = frozenset((source, target) for source, target in every_pair if (source > 3) == (target > 3))
    has_flag = flag_layer is not None
    return Planted(
        n_layers=n_layers,
        layer=layer,
        slice=slice,
        seed=seed,
        flag_layer=flag_layer,
        names=names,
        name_ids=name_ids,
        name_positions=NAME_POSITIONS,
        arrival_positions=tuple(position - slice for position in NAME_POSITIONS),
        written_positions=(LAST_POSITION,),
        name_channels=tuple(channels[: len(names)].tolist()),
        cross_talk=(layer,),
        local_layers=local_layers,
        needed_layers=(flag_layer, layer) if has_flag else (layer,),
        edges=(("embed", node), (node, "output")),
        fine_edges=(("embed", conv), (conv, ssm), (ssm, "output")),
        flag_edges=(("embed", str(flag_layer)), (str(flag_layer), node)) if has_flag else (),
        replace_succeeds=same_side if has_flag else every_pair,
        subtract_add_succeeds=every_pair,
    )


def _single_tokens(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> tuple[int, ...]:
    """The token ids of these words after a space."""
    encoded = tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]
    for word, ids in zip(words, encoded, strict=True):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no single token {' ' + word!r}; make it with build_tokenizer(names)")
    return tuple(ids[0] for ids in encoded)


def _silu(x: float) -> float:
    return F.silu(torch.tensor(x, dtype=torch.float64)).item()


def _whole_number(value: int, name: str, least: int, most: int | None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, not {value!r}")
    return number
