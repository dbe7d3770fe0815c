"""`planted`: a Mamba or Mamba-2 with a circuit for indirect object identification written in, the known answer.

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

In a Mamba-2 the circuit is the same, but for what `mamba_ioi.zoo.planted_mamba2` says: B takes a name's flag through
the name's own slice; with `layer=0` the second state of a name is in a second channel, since A is one number a head.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Mamba2ForCausalLM, MambaForCausalLM, PreTrainedTokenizerBase

from ..checks import whole_number
from ..tasks.ioi import NAMES
from .planted_mamba import MAMBA
from .planted_mamba2 import MAMBA2
from .planted_weights import Basis, Channels, rotate, single_tokens, write_vocabulary

__all__ = ["Planted", "build_planted", "planted_names"]

NAME_POSITIONS, LAST_POSITION = (3, 5, 7, 13, 15), 19  # in the aligned templates
SLICES = (-3, -2, -1, 0)
KINDS = {"mamba": MAMBA, "mamba2": MAMBA2}


@dataclass(frozen=True)
class Planted:
    """What is true of a planted model, by its construction. Slots are 1 … 5; positions are of the aligned templates.

    "Matters" is meant of resample ablation, clean and corrupt being a pair of `IOIDataset`: effect (1 - NLD) 1, where
    it is 0 (below 1e-4) for all else. The two prompts of a pair differ in one name slot; the flag, gate, B and C are
    the same in both.

    Attributes:
        family: "mamba" or "mamba2".
        n_layers: Number of layers.
        layer: The planted layer.
        slice: The conv slice, 0 to -3, by which names enter it. Of a Mamba-2 with a flag layer no other does anything;
            else the flag, or what `layer=0` has for it, enters by others.
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
            has arrived before the place, -1 for each after it. (`layer=0`: h[e, 0] - 2 * h[e, 1] is.) Of a Mamba-2, e
            counts through the heads of `ssm_input`, and h[e // P, e % P] takes the place of h[e]; P is head_dim.
        wiped_channels: Of a Mamba-2 with `layer=0` each name's second channel, w, else none: a head has one decay for
            all its states, so that h[e] - 2 * h[w], both of state 0, takes the place of the above.
        cross_talk: The layers whose token mixing matters, the minimal cross-talk set: the planted layer.
        local_layers: The layers in which no token reaches another position at all (one conv tap, B = 0).
        needed_layers: The layers whose removal (zero ablation) leaves accuracy at chance: flag and planted layer. The
            removal of any other changes no answer.
        edges: The edges that matter, alone and together: resampling all other edges changes nothing.
        fine_edges: The same in the fine graph of `mamba_ioi.circuits`: into the layer, through one slice of its conv
            and its SSM, and out. The layer's skip does not matter.
        flag_edges: The edges that carry the flag: they matter under zero ablation, but not when resampled.
        replace_succeeds: The (source slot, target slot) of name steering by replacement of `ssm_input` (means taken
            and written at the arrival positions) that succeed on every prompt; the others fail on every prompt. The
            source's flag comes with the name, so it must be the target's. Of a Mamba-2 all pairs: B is no part of
            `ssm_input`, and stays the target's.
        subtract_add_succeeds: The same for subtract-and-add, where the flag cancels: all pairs.
    """

    family: str
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
    wiped_channels: tuple[int, ...]
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
    n_names = whole_number(n_names, "n_names", least=4, most=len(usable))
    rng = random.Random(whole_number(seed, "seed", least=0, most=2**63 - 1))
    return tuple(usable.pop(int(rng.random() * len(usable))) for _ in range(n_names))


def build_planted(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_layers: int = 6,
    layer: int = 3,
    slice: int = -1,
    n_names: int = 24,
    seed: int = 0,
    family: str = "mamba",
) -> tuple[MambaForCausalLM | Mamba2ForCausalLM, Planted]:
    """A Mamba, or a Mamba-2, that solves IOI by a known circuit, and what that circuit is.

    The same arguments give the same weights, bit by bit; no global random state is read or changed.

    Args:
        tokenizer: Must have as single tokens " to", the places, the objects and `planted_names(n_names, seed)`.
        n_layers: Number of layers, at least 1.
        layer: The planted layer, 0 to n_layers - 1. With 0 the circuit has no flag layer.
        slice: The conv slice by which names enter, 0, -1, -2 or -3.
        n_names: How many names the model knows, at least 4.
        seed: 0 or more.
        family: "mamba" or "mamba2".

    Returns:
        The model (float32, eval mode, embeddings not tied; d_model is n_names + 21 rounded up to 8, d_inner twice
        that, d_state 16, d_conv 4; of a Mamba-2 head_dim 8 and 2 groups) and the `Planted` that describes it.

    Raises:
        ValueError: If an argument is out of range or the tokenizer splits one of the words.
    """
    if family not in KINDS:
        raise ValueError(f"family {family!r} cannot be planted; the families are {', '.join(KINDS)}")
    kind = KINDS[family]
    n_layers = whole_number(n_layers, "n_layers", least=1)
    layer = whole_number(layer, "layer", least=0, most=n_layers - 1)
    slice = whole_number(slice, "slice", least=min(SLICES), most=max(SLICES))
    seed = whole_number(seed, "seed", least=0, most=2**63 - 1)
    names = planted_names(n_names, seed)
    rng = random.Random(f"layers {seed}")
    flag_layer = int(rng.random() * layer) if layer else None
    needed = (layer,) if flag_layer is None else (flag_layer, layer)
    local = tuple(i for i in range(n_layers) if rng.random() < 0.5 and i not in needed)

    generator = torch.Generator().manual_seed(seed)
    basis = Basis(len(names))
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = kind.config(
        vocab_size=len(tokenizer),
        hidden_size=basis.size,
        num_hidden_layers=n_layers,
        tie_word_embeddings=False,
        **kind.sizes(basis.size),
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        model = kind.model(config).eval()
    name_ids = single_tokens(tokenizer, names)
    with torch.no_grad():
        write_vocabulary(model, tokenizer, name_ids, basis, generator)
        mixers = [block.mixer for block in model.backbone.layers]
        for i, mixer in enumerate(mixers):
            kind.write_random_layer(mixer, basis, 1 / n_layers, i in local, generator)
        channels = kind.draw_channels(mixers[layer], len(names), layer > 0, generator)
        if flag_layer is not None:
            kind.write_flag_layer(mixers[flag_layer], basis, channels)
        kind.write_planted_layer(mixers[layer], basis, channels, slice, layer > 0)
        rotate(model, generator)
    return model, _truth(family, n_layers, layer, slice, seed, flag_layer, local, names, name_ids, channels)


def _truth(
    family: str,
    n_layers: int,
    layer: int,
    slice: int,
    seed: int,
    flag_layer: int | None,
    local_layers: tuple[int, ...],
    names: tuple[str, ...],
    name_ids: tuple[int, ...],
    channels: Channels,
) -> Planted:
    node, conv, ssm = str(layer), f"{layer}.conv[{slice}]", f"{layer}.ssm"
    slots = range(1, 6)
    every_pair = frozenset((source, target) for source in slots for target in slots)
    same_side = frozenset((source, target) for source, target in every_pair if (source > 3) == (target > 3))
    has_flag = flag_layer is not None
    return Planted(
        family=family,
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
        name_channels=tuple(channels.names.tolist()),
        wiped_channels=tuple(channels.wiped.tolist()),
        cross_talk=(layer,),
        local_layers=local_layers,
        needed_layers=(flag_layer, layer) if has_flag else (layer,),
        edges=(("embed", node), (node, "output")),
        fine_edges=(("embed", node), (node, conv), (f"{node}.conv", ssm), (ssm, node), (node, "output")),
        flag_edges=(("embed", str(flag_layer)), (str(flag_layer), node)) if has_flag else (),
        replace_succeeds=same_side if has_flag and family == "mamba" else every_pair,
        subtract_add_succeeds=every_pair,
    )
