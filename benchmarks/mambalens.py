r"""Every named activation and every patch of mamba_ioi, compared with MambaLens on random weights; and their speed.

MambaLens 0.0.4 needs older packages than mamba_ioi, so the comparison is one file with several roles. `reference` runs
where MambaLens is installed and writes a reference file; `compare` and `race` run where mamba_ioi is:

    python3 -m venv mlens
    mlens/bin/pip install mamba-lens==0.0.4 "transformer-lens==2.16.1" "transformers<4.58" "numpy<2" "pyarrow<20" \
        "datasets<4" torch==2.13.0
    mlens/bin/python benchmarks/mambalens.py reference reference.npz
    python benchmarks/mambalens.py compare reference.npz
    python benchmarks/mambalens.py race mlens/bin/python

The reference file holds random weights in the original state-spaces layout, tokens, MambaLens's activation at every
hook, and its logits under patches: one random value at one position for every hook of every layer, h at several
positions, and several patches at once. `compare` loads the same weights with `mamba_ioi.load_model`, prints for each
hook the largest relative difference, max |a - b| / max |b|, of the activations and of the patched logits, and exits
with 1 where one is above the tolerance. Beside it stands MambaLens's own rounding error, its float32 against its
float64: with many layers (16, say) both pass 1e-5, and neither implementation is then wrong.

Two things need a word. MambaLens has no hook for conv slices: the reference rebuilds them from its hook_in_proj and
hook_conv. And mamba_ioi has no site for MambaLens's hook_h_start (the state before position 0, always zero): a patch
of it is expressed as the patch of h at position 0 that it amounts to, A_bar * h_start + B_bar * x.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# fmt: off
LAYER_SITES = (
    "resid_pre", "layer_input", "normalized_input", "skip", "in_proj", "conv", "conv_slice", "ssm_input", "A",
    "delta_1", "delta_2", "B", "C", "delta", "A_bar", "B_bar", "h_start", "h", "y", "ssm_output", "after_skip",
    "out_proj", "resid_post",
)
# fmt: on
SMALLEST_EFFECT = 1e-3
"""A patch that moves the logits by less, relative to the largest logit, would show nothing: it is refused."""


class Change(NamedTuple):
    """One patch. `layer` is None for embed, norm and logits; `positions` None means the whole activation."""

    site: str
    layer: int | None
    positions: list[int] | None
    slice: int | None
    value: Tensor

    @property
    def hook(self) -> str:
        return hook_name(self.site, self.layer)


def hook_name(site: str, layer: int | None) -> str:
    return f"hook_{site}" if layer is None else f"blocks.{layer}.hook_{site}"


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|; infinite where the shapes differ or a number is not finite."""
    if value.shape != reference.shape or not (value.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def configuration(layers: int, d_model: int, vocab: int) -> dict:
    """The fields of the published checkpoints; the vocabulary is padded to a multiple of 8 there too."""
    return {"d_model": d_model, "n_layer": layers, "vocab_size": vocab, "ssm_cfg": {}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip


def random_weights(config: dict, seed: int) -> dict[str, Tensor]:
    """Weights in the original state-spaces layout; no parameter is zero, one, or equal over channels or states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    D, N, R = config["d_model"], 16, -(-config["d_model"] // 16)
    E, multiple = 2 * D, config["pad_vocab_size_multiple"]
    embedding = normal(-(-config["vocab_size"] // multiple) * multiple, D)
    weights = {"backbone.embedding.weight": embedding, "lm_head.weight": embedding.clone()}
    for layer in range(config["n_layer"]):
        parameters = {
            "norm.weight": normal(D, scale=0.3, mean=1),
            "mixer.in_proj.weight": normal(2 * E, D, scale=D**-0.5),
            "mixer.conv1d.weight": normal(E, 1, 4, scale=0.7),
            "mixer.conv1d.bias": normal(E, scale=0.5),
            "mixer.x_proj.weight": normal(R + 2 * N, E, scale=1.5 * E**-0.5),
            "mixer.dt_proj.weight": normal(E, R, scale=R**-0.5),
            "mixer.dt_proj.bias": normal(E, scale=1.5, mean=-1),
            # exp(-7) hardly forgets, exp(4) forgets at once: the range of trained models but for their dead states
            "mixer.A_log": torch.rand(E, N, generator=generator) * 11 - 7,
            "mixer.D": normal(E, mean=1),
            "mixer.out_proj.weight": normal(D, E, scale=E**-0.5),
        }
        weights |= {f"backbone.layers.{layer}.{name}": value for name, value in parameters.items()}
    weights["backbone.norm_f.weight"] = normal(D, scale=0.3, mean=1)
    return weights


# ---------------------------------------------------------------------------------------------- under MambaLens


def load_mambalens(config: dict, weights: dict[str, Tensor]):
    """A HookedMamba on the CPU from a configuration and an original state dict, without the Hub or a tokenizer."""
    from mamba_lens import HookedMamba
    from mamba_lens.HookedMamba import (
        convert_original_config_to_hooked_mamba_config,
        convert_original_state_dict_to_hooked_state_dict,
    )

    cfg = convert_original_config_to_hooked_mamba_config(config, device="cpu")
    model = HookedMamba(cfg=cfg, tokenizer=None).to(weights["lm_head.weight"].dtype)
    model.load_state_dict(convert_original_state_dict_to_hooked_state_dict(cfg, weights))
    return model


def mambalens_activations(model, tokens: Tensor) -> dict[str, Tensor]:
    """Every hook's activation; the hooks `hook_h.0`, `hook_h.1`, ... stay separate."""
    _, cache = model.run_with_cache(tokens, fast_conv=False, fast_ssm=False)
    return dict(cache.cache_dict)


def conv_slices(model, layer: int, in_proj: Tensor) -> Tensor:
    """[B, L, E, 4]: the terms of the convolution of `in_proj` [B, L, E] for slices -3, -2, -1 and 0."""
    weight = model.blocks[layer].conv1d.weight[:, 0]
    padded = torch.nn.functional.pad(in_proj, (0, 0, 3, 0))
    return torch.stack([padded[:, k : k + in_proj.shape[1]] * weight[:, k] for k in range(4)], dim=-1)


def hooks_of(model, change: Change) -> list[tuple]:
    """The MambaLens forward hooks that make one change."""
    positions, value = change.positions, change.value
    if change.site == "h":
        return [
            (f"{change.hook}.{position}", lambda h, hook, k=k: value[:, k].clone())
            for k, position in enumerate(positions)
        ]
    if change.site == "conv_slice":
        seen = {}

        def remember(in_proj: Tensor, hook) -> None:
            seen["terms"] = conv_slices(model, change.layer, in_proj)[..., change.slice + 3]

        def swap_term(conv: Tensor, hook) -> Tensor:
            conv = conv.clone()
            conv[:, positions] += value - seen["terms"][:, positions]
            return conv

        return [(hook_name("in_proj", change.layer), remember), (hook_name("conv", change.layer), swap_term)]

    def write(activation: Tensor, hook) -> Tensor:
        activation = activation.clone()
        activation[... if positions is None else (slice(None), positions)] = value
        return activation

    return [(change.hook, write)]


def mambalens_logits(model, tokens: Tensor, changes: list[Change]) -> Tensor:
    """[B, L, V]: the logits under all the changes at once."""
    hooks = [hook for change in changes for hook in hooks_of(model, change)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, fast_conv=False, fast_ssm=False)


def choose_cases(acts: dict[str, Tensor], n_layers: int, length: int, seed: int) -> list[list[Change]]:
    """What to patch: every hook of every layer at one position, h at all, then several positions and patches at once.

    A value is the activation of another row of the batch, each number times a factor from [0.5, 1.5): of the right
    size and sign, and equal to nothing else.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def change(site: str, layer: int | None, positions: list[int] | None, slice: int | None = None) -> Change:
        value = acts["h" if site == "h_start" else site, layer]
        if site == "h_start":
            value = value[:, 0]
        elif positions is not None:
            value = value[:, positions]
        if slice is not None:
            value = value[..., slice + 3]
        factor = torch.rand(value.shape, generator=generator) + 0.5
        return Change(site, layer, positions, slice, value.flip(0) * factor)

    middle = length // 2
    cases = [[change(site, None, [middle])] for site in ("embed", "norm", "logits")]
    for layer in range(n_layers):
        for site in LAYER_SITES:
            if site == "conv_slice":
                cases += [[change(site, layer, [middle], s)] for s in (-3, -2, -1, 0) if middle + s >= 0]
            elif site in ("A", "A_bar") and length == 1:
                continue  # nothing decays
            elif site == "h":
                cases += [[change(site, layer, [position])] for position in range(length)]
            else:
                cases.append([change(site, layer, None if site in ("A", "h_start") else [middle])])
    first, last = 0, n_layers - 1
    for site in ("layer_input", "conv", "ssm_input", "delta", "B_bar", "y", "out_proj"):
        cases += [[change(site, first, sorted({0, middle, length - 1}))], [change(site, first, None)]]
    cases.append([change("h", first, sorted({middle // 2, middle, length - 1}))])
    cases.append([change("h", first, [middle]), change("ssm_input", first, [middle])])
    cases.append([change("h", first, [middle // 2]), change("A_bar", first, [middle]), change("C", last, None)])
    cases.append([change("in_proj", last, [middle]), change("conv_slice", last, [middle], 0)])
    cases.append([change("layer_input", layer, [middle]) for layer in range(n_layers)])
    cases.append([change("resid_pre", first, [0]), change("skip", first, [middle]), change("resid_post", last, [0])])
    cases += [[Change("out_proj", layer, None, None, torch.zeros(()))] for layer in range(n_layers)]
    return cases


@torch.no_grad()
def write_reference(path: Path, *, layers: int, d_model: int, vocab: int, batch: int, length: int, seed: int) -> None:
    """Run MambaLens on random weights and tokens, and write weights, activations and patched logits to `path`."""
    config = configuration(layers, d_model, vocab)
    weights = random_weights(config, seed)
    tokens = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed + 2))
    model = load_mambalens(config, weights)
    exact_model = load_mambalens(config, {name: value.double() for name, value in weights.items()})
    hooks, exact_hooks = mambalens_activations(model, tokens), mambalens_activations(exact_model, tokens)

    acts = {(site, None): hooks[hook_name(site, None)] for site in ("embed", "norm", "logits")}
    for layer in range(layers):
        in_proj = hooks[hook_name("in_proj", layer)]
        hooks[hook_name("conv_slice", layer)] = conv_slices(model, layer, in_proj)
        exact_in_proj = exact_hooks[hook_name("in_proj", layer)]
        exact_hooks[hook_name("conv_slice", layer)] = conv_slices(exact_model, layer, exact_in_proj)
        states = [hooks[f"{hook_name('h', layer)}.{position}"] for position in range(length)]
        acts |= {(site, layer): hooks[hook_name(site, layer)] for site in LAYER_SITES if site != "h"}
        acts["h", layer] = torch.stack(states, dim=1)

    arrays = {"config": np.array(json.dumps(config)), "tokens": tokens.numpy()}
    arrays |= {f"weights/{name}": value.numpy() for name, value in weights.items()}
    arrays |= {f"activations/{name}": value.numpy() for name, value in hooks.items()}
    arrays |= {f"rounding/{name}": relative_difference(value, exact_hooks[name]) for name, value in hooks.items()}
    clean = hooks["hook_logits"]
    cases = choose_cases(acts, layers, length, seed)
    for number, case in enumerate(cases):
        logits = mambalens_logits(model, tokens, case)
        if (logits - clean).abs().max() < SMALLEST_EFFECT * clean.abs().max():
            raise RuntimeError(f"the patch {[c.hook for c in case]} has almost no effect: it would test nothing")
        exact = mambalens_logits(exact_model, tokens, [c._replace(value=c.value.double()) for c in case])
        arrays[f"patched/{number}/logits"] = logits.numpy()
        arrays[f"patched/{number}/rounding"] = relative_difference(logits, exact)
        arrays[f"patched/{number}/changes"] = np.array(json.dumps([change[:4] for change in case]))
        arrays |= {f"patched/{number}/value{k}": change.value.numpy() for k, change in enumerate(case)}
    if not torch.equal(model(tokens), clean):
        raise RuntimeError("MambaLens's logits changed after the patched runs: a hook was left behind")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(hooks)} hooks, {len(cases)} patched runs, {tuple(tokens.shape)} tokens")


# ---------------------------------------------------------------------------------------------- under mamba_ioi


class Difference(NamedTuple):
    """How far mamba_ioi is from MambaLens, and how far MambaLens is from itself in float64, at one place."""

    relative: float
    rounding: float
    where: str


def load_ours(reference: dict[str, np.ndarray]):
    """The reference's weights as an original state-spaces checkpoint folder, loaded by `mamba_ioi.load_model`."""
    from safetensors.torch import save_file

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the folder has no tokenizer, and none is needed
    import mamba_ioi

    weights = {key.removeprefix("weights/"): torch.from_numpy(value) for key, value in reference.items()
               if key.startswith("weights/")}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(str(reference["config"]))
        save_file(weights, Path(folder) / "model.safetensors")
        return mamba_ioi.load_model(folder, dtype=torch.float32)


def compare_activations(model, tokens: Tensor, reference: dict[str, np.ndarray]) -> dict[str, list[Difference]]:
    """The relative difference of every hook, under the name of its site."""
    import mamba_ioi

    n_layers = json.loads(str(reference["config"]))["n_layer"]
    sites = [hook_name(site, None) for site in ("embed", "norm", "logits")]
    sites += [hook_name(s, layer) for layer in range(n_layers) for s in LAYER_SITES if s != "h_start"]
    ours = mamba_ioi.cache(model, tokens, sites)

    differences = defaultdict(list)
    for key, value in reference.items():
        name = key.removeprefix("activations/")
        if name == key:
            continue
        theirs, (hook, _, position) = torch.from_numpy(value), name.partition("hook_h.")
        if name.endswith("hook_h_start"):
            relative = theirs.abs().max().item()  # no site: it must be zero
        elif position:
            relative = relative_difference(ours[hook + "hook_h"][:, int(position)], theirs)
        else:
            relative = relative_difference(ours[name], theirs)
        site = "h" if position else name.rpartition("hook_")[2]
        differences[site].append(Difference(relative, float(reference[f"rounding/{name}"]), name))
    return differences


def as_patches(model, tokens: Tensor, changes: list[Change]) -> list:
    """The reference's changes as mamba_ioi patches."""
    import mamba_ioi

    patches = []
    for site, layer, positions, slice_, value in changes:
        if site == "h_start":
            names = [hook_name(s, layer) for s in ("A_bar", "B_bar", "ssm_input")]
            A_bar, B_bar, x = (a[:, :1] for a in mamba_ioi.cache(model, tokens, names).values())
            site, positions, value = "h", [0], A_bar * value[:, None] + B_bar * x[..., None]
        patches.append(mamba_ioi.Patch(site, layer, value if value.dim() else value.item(), positions, slice_))
    return patches


def compare_patches(model, tokens: Tensor, reference: dict[str, np.ndarray]) -> dict[str, list[Difference]]:
    """The relative difference of the logits of every patched run, under the names of the sites patched."""
    import mamba_ioi

    differences = defaultdict(list)
    numbers = [key.split("/")[1] for key in reference if key.startswith("patched/") and key.endswith("logits")]
    for number in numbers:
        changes = [
            Change(*fields, torch.from_numpy(reference[f"patched/{number}/value{k}"]))
            for k, fields in enumerate(json.loads(str(reference[f"patched/{number}/changes"])))
        ]
        theirs = torch.from_numpy(reference[f"patched/{number}/logits"])
        ours = mamba_ioi.run(model, tokens, as_patches(model, tokens, changes), positions="all")
        where = " + ".join(f"{c.hook}{'' if c.slice is None else f'({c.slice})'}@{c.positions}" for c in changes)
        site = " + ".join(dict.fromkeys(c.site for c in changes))
        rounding = float(reference[f"patched/{number}/rounding"])
        differences[site].append(Difference(relative_difference(ours, theirs), rounding, where.replace("@None", "")))
    return differences


def compare(path: Path, tolerance: float) -> bool:
    """Print the largest difference of each hook, and return whether all are within the tolerance."""
    with np.load(path, allow_pickle=False) as file:
        reference = dict(file)
    tokens = torch.from_numpy(reference["tokens"])
    model = load_ours(reference)
    acts = compare_activations(model, tokens, reference)
    logits = compare_patches(model, tokens, reference)

    def cells(differences: list[Difference]) -> str:
        if not differences:
            return " " * 26
        rounding = max(difference.rounding for difference in differences)
        return f"{len(differences):>5} {max(differences).relative:>10.1e} {rounding:>9.1e}"

    print(f"{'':<30} {'activations':>26} {'patched logits':>26}")
    columns = f"{'n':>5} {'mamba_ioi':>10} {'rounding':>9}"
    print(f"{'hook':<30} {columns} {columns}  worst place")
    failed = False
    for site in dict.fromkeys([*acts, *logits]):
        worst = max(acts[site] + logits[site])
        too_large = worst.relative > tolerance
        failed |= too_large
        print(f"{site:<30} {cells(acts[site])} {cells(logits[site])}  {worst.where}{'  TOO LARGE' * too_large}")
    print(f"largest relative difference allowed: {tolerance:g}; {'exceeded' if failed else 'kept by every hook'}")
    return not failed


# ---------------------------------------------------------------------------------------------- speed


@torch.no_grad()
def serve(*, layers: int, prompts: int) -> None:
    """Under MambaLens: for each hook's name read, run the shape of mamba-370m with that hook and print the seconds."""
    config = configuration(layers, 1024, 50280)
    model = load_mambalens(config, random_weights(config, seed=0))
    tokens = torch.randint(500, (prompts, 20), generator=torch.Generator().manual_seed(0))
    for line in sys.stdin:
        started = time.perf_counter()
        model.run_with_hooks(tokens, fwd_hooks=[(line.strip(), lambda value, hook: value.clone())])
        print("seconds", time.perf_counter() - started, flush=True)


def race(lens: Path, *, layers: int, prompts: int, rounds: int) -> None:
    """Print what a cell and prompt of a resample sweep cost here, as a ratio to MambaLens's hooked forward of a prompt.

    The two take turns on the same machine, and the smallest time of each counts. MambaLens runs the prompts anew for
    every cell, whichever it is.
    """
    from mamba_ioi import bench
    from mamba_ioi.interventions.patch import Resample
    from mamba_ioi.interventions.readout import Readout
    from mamba_ioi.interventions.sweep import sweep

    command = [str(lens), __file__, "serve", "--layers", str(layers), "--prompts", str(prompts)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def theirs(hook: str) -> float:
        worker.stdin.write(f"{hook}\n")
        worker.stdin.flush()
        answers = (line.split() for line in worker.stdout)  # MambaLens prints as well
        return next(float(words[1]) for words in answers if words[:1] == ["seconds"])

    model = bench.of_shape("mamba", layers)
    data = bench.pairs(model, prompts)
    readout, length = Readout.of(data), data.clean_tokens.shape[1]
    every = range(0, layers, max(1, layers // 12))
    for site, hook in (
        ("layer_input", f"blocks.{layers // 2}.hook_layer_input"),
        ("h", f"blocks.{layers // 2}.hook_h.9"),
    ):
        cells = [[Resample(site, layer, position)] for layer in every for position in range(length)]
        mine, others = [], []
        for _ in range(rounds):
            others += [theirs(hook), theirs(hook)]
            started = time.perf_counter()
            sweep(model, data.clean_tokens, cells, readout, source=data.corrupt_tokens)
            mine.append((time.perf_counter() - started) / len(cells))
        ours, other = min(mine), min(others)
        times = f"{ours:.3f} s a cell of {prompts} prompts, {other:.2f} s"
        print(f"{site}: {ours / other:.4f} of MambaLens with {hook} ({times})")
    worker.stdin.close()
    worker.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = parser.add_subparsers(dest="role", required=True)
    reference = roles.add_parser("reference", help="write a reference file (under MambaLens)")
    reference.add_argument("path", type=Path)
    defaults = {"layers": 3, "d-model": 32, "vocab": 101, "batch": 3, "length": 12, "seed": 0}
    for option, default in defaults.items():
        reference.add_argument(f"--{option}", type=int, default=default, help=f"{default} unless told")
    comparison = roles.add_parser("compare", help="compare mamba_ioi with a reference file")
    comparison.add_argument("path", type=Path)
    comparison.add_argument("--tolerance", type=float, default=1e-5)
    timing = roles.add_parser("race", help="set sweeps beside MambaLens on the shape of mamba-370m")
    timing.add_argument("lens", type=Path, help="the Python where MambaLens is")
    timing.add_argument("--rounds", type=int, default=2, help="2 unless told")
    for one in (timing, roles.add_parser("serve", help="MambaLens's side of a race")):
        one.add_argument("--layers", type=int, default=48, help="48 unless told")
        one.add_argument("--prompts", type=int, default=8, help="8 unless told")
    arguments = vars(parser.parse_args())

    role = arguments.pop("role")
    if role == "compare":
        return 0 if compare(**arguments) else 1
    {"reference": write_reference, "race": race, "serve": serve}[role](**arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
