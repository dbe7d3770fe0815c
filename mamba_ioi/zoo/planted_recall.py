"""`planted_recall`: a Mamba with a circuit for associative recall written in, the known answer of the recall study.

Nothing is trained. The residual stream holds an orthogonal feature for each key and each value, a constant, a few for
all other tokens, and a scratch space, turned by a random rotation. Every token's embedding has the same length, so
RMSNorm is one fixed scale. One layer does all of it:

- Its conv binds: a channel a value sees that value through the tap ``slice + 1``, a channel a key sees that key through
  the tap ``slice``; so with -1 both meet at the value's own position, with -3 two tokens later. A third kind of channel
  sees the key at its own position.
- B is the key that was seen through the tap, C the key at the position itself, each key a dimension of the state: so
  the write of a value stands under its key, and the query reads what stands under its own. The state does not decay.
- out_proj writes what was read onto the values' features, which the unembedding reads.

One layer is enough, since in a Mamba x, B and C are functions of one conv. All other layers are random ones as in
`mamba_ioi.zoo.planted`, which write into the scratch space alone.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase
from transformers.models.mamba.modeling_mamba import MambaMixer

from ..checks import whole_number
from ..tasks.recall import vocabularies
from .planted_mamba import MAMBA, STEP, clear
from .planted_weights import CONSTANT, LOGIT, OPEN, OTHER, SCRATCH, WRITTEN, Basis, conv_bias, rotate, silu, step_bias

SLICES = (-3, -2, -1)
LENGTH2 = CONSTANT**2 + 1  # of every embedding: the constant, the kind of token 1


@dataclass(frozen=True)
class PlantedRecall:
    """What is true of a planted model, by its construction.

    Attributes:
        n_layers: number of layers.
        layer: the layer that recalls.
        slice: the tap through which it reads a key, -1 to -3; the value comes in through the next tap.
        shift: how many tokens after a value's own place the pair is written, ``-1 - slice``.
        seed: of the rotation, the channels and the other layers.
        keys: the keys' token ids.
        values: the values' token ids.
        value_channels: the inner channels, one a value, whose states hold what stands under each key.
        fine_edges: the edges between parts that the circuit is made of.
    """

    n_layers: int
    layer: int
    slice: int
    shift: int
    seed: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    value_channels: tuple[int, ...]
    fine_edges: tuple[tuple[str, str], ...]


class _Basis(Basis):
    """Which dimension of the residual stream, before the rotation, holds which feature."""

    def __init__(self, n_keys: int) -> None:
        self.keys, self.values = torch.arange(n_keys), torch.arange(n_keys) + n_keys
        self.constant = 2 * n_keys
        self.other = torch.arange(OTHER) + 2 * n_keys + 1
        first = 2 * n_keys + 1 + OTHER
        self.size = 8 * math.ceil((first + SCRATCH) / 8)
        self.scratch = torch.arange(first, self.size)


def build_planted_recall(
    tokenizer: PreTrainedTokenizerBase, *, n_layers: int = 2, layer: int = 1, slice: int = -1, seed: int = 0
) -> tuple[MambaForCausalLM, PlantedRecall]:
    """A Mamba that recalls by a known circuit, and what that circuit is.

    The same arguments give the same weights, bit by bit; no global random state is read or changed.

    Args:
        tokenizer: of `build_tokenizer`; its keys and values are those of the task.
        n_layers: number of layers, at least 1.
        layer: the planted layer, 0 to n_layers - 1.
        slice: the tap through which it reads keys: -1, -2 or -3.
        seed: 0 or more.

    Returns:
        The model (float32, eval mode, d_state as many as there are keys, d_conv 4) and what is true of it.

    Raises:
        ValueError: if an argument is out of range.
    """
    n_layers = whole_number(n_layers, "n_layers", least=1)
    layer = whole_number(layer, "layer", least=0, most=n_layers - 1)
    slice = whole_number(slice, "slice", least=min(SLICES), most=max(SLICES))
    seed = whole_number(seed, "seed", least=0, most=2**63 - 1)
    keys, values = vocabularies(tokenizer)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(f"layers {seed}")
    basis = _Basis(len(keys))
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=basis.size,
        num_hidden_layers=n_layers,
        state_size=len(keys),
        time_step_rank=8,
        tie_word_embeddings=False,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        _write_vocabulary(model, keys, values, basis, generator)
        mixers: list[MambaMixer] = [block.mixer for block in model.backbone.layers]  # pyright: ignore[reportAssignmentType]
        for mixer in mixers:
            MAMBA.write_random_layer(mixer, basis, 1 / n_layers, rng.random() < 0.5, generator)
        channels = torch.randperm(mixers[layer].intermediate_size, generator=generator)[: 3 * len(keys)]
        _write_recall(mixers[layer], basis, channels.view(3, -1), slice)
        rotate(model, generator)
    node = str(layer)
    bind, own = f"{node}.conv[{slice}]", f"{node}.conv[0]"
    inward = dict.fromkeys((bind, f"{node}.conv[{slice + 1}]", own))
    edges = (
        ("embed", node),
        *((node, part) for part in inward),
        (f"{node}.conv", f"{node}.ssm"),
        (f"{node}.ssm", node),
    )
    truth = PlantedRecall(
        n_layers=n_layers,
        layer=layer,
        slice=slice,
        shift=-1 - slice,
        seed=seed,
        keys=tuple(keys),
        values=tuple(values),
        value_channels=tuple(channels[: len(keys)].tolist()),
        fine_edges=(*edges, (node, "output")),
    )
    return model, truth


def _write_recall(mixer: MambaMixer, basis: _Basis, channels: Int[Tensor, "3 keys"], slice: int) -> None:
    """Bind each value to the key before it, and read at a key what stands under it."""
    values, bound, own = channels
    clear(mixer, channels.flatten())
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    for kinds, seen, tap in ((basis.values, values, slice + 1), (basis.keys, bound, slice), (basis.keys, own, 0)):
        for feature, channel in zip(kinds.tolist(), seen.tolist(), strict=True):
            mixer.in_proj.weight[channel] = basis.read({feature: OPEN}, LENGTH2)
            mixer.conv1d.weight[channel, 0, tap - 1] = 1.0  # the last of the four taps is slice 0
    mixer.dt_proj.bias[values] = step_bias(STEP)
    state = torch.arange(states)
    mixer.x_proj.weight[rank + state, bound] = 1 / (STEP * silu(OPEN) ** 2)  # B: a value adds 1 to h, under its key
    mixer.x_proj.weight[rank + states + state, own] = 1 / silu(OPEN)  # C: 1 for the key itself
    mixer.in_proj.weight[inner + values] = basis.read({basis.constant: OPEN}, LENGTH2)
    mixer.out_proj.weight[basis.values, values] = WRITTEN / silu(OPEN)
    conv_bias(mixer)[channels.flatten()] = 0.0


def _write_vocabulary(
    model: MambaForCausalLM, keys: list[int], values: list[int], basis: _Basis, generator: torch.Generator
) -> None:
    """Embeddings of one length, and an unembedding that reads the values' features."""
    embeddings, unembedding = model.backbone.embeddings.weight, model.lm_head.weight
    embeddings.zero_()
    other = torch.randn(len(embeddings), OTHER, generator=generator)
    embeddings[:, basis.other] = other / other.norm(dim=1, keepdim=True)
    unembedding.copy_(torch.randn(unembedding.shape, generator=generator) * 0.3 / math.sqrt(basis.size))
    unembedding[:, basis.values] = 0.0
    for tokens, features in ((keys, basis.keys), (values, basis.values)):
        for token, feature in zip(tokens, features.tolist(), strict=True):
            embeddings[token] = 0.0
            embeddings[token, feature] = 1.0
    for token, feature in zip(values, basis.values.tolist(), strict=True):
        unembedding[token] = basis.read({feature: LOGIT / WRITTEN}, LENGTH2 + WRITTEN**2)
    embeddings[:, basis.constant] = CONSTANT
