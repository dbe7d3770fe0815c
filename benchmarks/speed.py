"""Speed on the shape of mamba-370m (random weights): ratios measured in one run, since machines are noisy.

    python benchmarks/speed.py [--layers 48] [--prompts 32] [--threads 2] [--only forward,sweep,h,eap,length]

Every line is the smallest of `--repeats` timings, taken in turn with what it is compared to.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

from mamba_ioi import IOIDataset, circuits, load_model, run
from mamba_ioi.model import MambaModel, wrap
from mamba_ioi.sweep import Readout, Resample, sweep


def mamba_370m(layers: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MambaModel:
    """The shape of mamba-370m with random weights and `tiny`'s tokenizer, whose ids are a part of its vocabulary."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50280,
        hidden_size=1024,
        num_hidden_layers=layers,
        state_size=16,
        conv_kernel=4,
        expand=2,
        time_step_rank=64,
        residual_in_fp32=True,
    )
    module = MambaForCausalLM(config).eval().to(device=device, dtype=dtype)
    return wrap(module, load_model("tiny").tokenizer, model_id="mamba-370m shape, random weights")


def timed(repeats: int, *works: Callable[[], object]) -> list[float]:
    """The smallest time of each piece of work in seconds, the pieces taken in turn."""
    times = [[] for _ in works]
    for _ in range(repeats):
        for mine, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            mine.append(time.perf_counter() - start)
    return [min(mine) for mine in times]


def matrix_products(model: MambaModel, rows: int, length: int) -> Callable[[], None]:
    """Only the matrix products of a forward with last-position logits."""
    x = torch.randn(rows * length, model.d_model, dtype=model.dtype, device=model.device)
    blocks = [block.mixer for block in model._module.backbone.layers]
    head = model._module.lm_head

    def work() -> None:
        with torch.no_grad():
            for mixer in blocks:
                inner = mixer.in_proj(x)[:, : model.d_inner]
                mixer.dt_proj(mixer.x_proj(inner)[:, : model.dt_rank])
                mixer.out_proj(inner)
            head(x[:rows])

    return work


def forward(model: MambaModel, data: IOIDataset, repeats: int) -> float:
    """One traced forward against the untouched model and against its matrix products; seconds a prompt of the model."""
    tokens = data.clean_tokens.to(model.device)
    rows, length = tokens.shape

    def untouched() -> None:
        with torch.no_grad():
            model._module(tokens, use_cache=False, logits_to_keep=1)

    run(model, tokens[:2])
    hf, ours, products = timed(repeats, untouched, lambda: run(model, tokens), matrix_products(model, rows, length))
    print(f"forward of {rows} prompts: untouched {hf:.2f} s, ours {ours:.2f} s, matrix products {products:.2f} s")
    print(f"  ours / untouched = {ours / hf:.3f} (bar 0.35); ours / products = {ours / products:.2f} (bar 1.5)")
    return hf / rows


def cells(model: MambaModel, data: IOIDataset, site: str, hf: float) -> None:
    """A layer x position sweep, a cell and prompt, against an untouched forward of a prompt."""
    layers = range(0, model.n_layers, max(1, model.n_layers // 12))
    length = data.clean_tokens.shape[1]
    grid = [[Resample(site, layer, position)] for layer in layers for position in range(length)]
    readout = Readout.of(data)
    (seconds,) = timed(1, lambda: sweep(model, data.clean_tokens, grid, readout, source=data.corrupt_tokens))
    each = seconds / (len(grid) * len(data))
    parted = (data.clean_tokens != data.corrupt_tokens).int().argmax(1)
    live = float((length - parted).float().mean() / length)
    print(f"sweep of {site}, {len(grid)} cells x {len(data)} prompts: {seconds:.1f} s, {each * 1e3:.2f} ms each")
    print(f"  each / untouched forward of a prompt = {each / hf:.4f} (bar for layer_input 0.1)")
    print(f"  of the cells that had to run (the prompts have parted there: {live:.2f} of all): {each / live / hf:.4f}")


def eap(model: MambaModel, data: IOIDataset) -> None:
    """EAP with 5 steps against 5 of our own forwards of the pairs, with positional and fine scores on top."""
    works = [
        lambda: [run(model, data.clean_tokens) for _ in range(5)],
        lambda: circuits.eap(model, data, steps=5, progress=False),
        lambda: circuits.eap(model, data, steps=5, positional=True, fine=True, progress=False),
    ]
    plain, coarse, full = timed(1, *works)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"EAP, {len(data)} rows, 5 steps: {coarse:.1f} s; positional and fine {full:.1f} s; 5 forwards {plain:.1f} s")
    print(f"  EAP / forwards = {coarse / plain:.2f} (bar 3.5), full / EAP = {full / coarse:.2f} (bar 1.3)")
    print(f"  peak memory of the process so far {peak:.1f} GiB (bar 8)")


def length(model: MambaModel) -> None:
    """How the cost grows with the prompt's length and with the layers: exponents of a power law."""
    lengths = [20, 80, 320]
    times = []
    for size in lengths:
        tokens = torch.randint(0, 500, (4, size), device=model.device)
        times.append(timed(2, lambda tokens=tokens: run(model, tokens))[0])
    exponent = np.polyfit(np.log(lengths), np.log(times), 1)[0]
    print(f"forward of 4 prompts of {lengths} tokens: {[round(t, 2) for t in times]} s, exponent {exponent:.2f}")


def main() -> None:
    """Run the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--sweep-prompts", type=int, default=10)
    parser.add_argument("--eap-prompts", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="forward,sweep,h,eap,length")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    model = mamba_370m(args.layers, getattr(torch, args.dtype), args.device)
    chosen = args.only.split(",")

    def pairs(rows: int) -> IOIDataset:
        return IOIDataset.generate(model.tokenizer, -(-rows // 2))[:rows]

    hf = forward(model, pairs(args.prompts), args.repeats)
    if "sweep" in chosen:
        cells(model, pairs(args.sweep_prompts), "layer_input", hf)
    if "h" in chosen:
        cells(model, pairs(args.sweep_prompts), "h", hf)
    if "eap" in chosen:
        eap(model, pairs(args.eap_prompts))
    if "length" in chosen:
        length(model)


if __name__ == "__main__":
    main()
