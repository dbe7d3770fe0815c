"""A dictionary of features of a packaged model, trained by sae-lens on what `activations` gives.

    pip install 'mamba-ioi[sae]'
    python benchmarks/features.py OUT [--model tiny] [--site ssm_input] [--layer 1] [--features 256] [--k 16] [--seed 0]

The dictionaries that ship for `tiny` were made by it; their card, `mamba_ioi/zoo/tiny_features/README.md`, has the
commands and what was measured. OUT is a folder that `mamba_ioi.load_dictionary` and sae-lens read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from mamba_ioi import activations, load_dictionary, load_model, tasks

BATCH = 1024
PROMPTS = 4000


def rows(model, site: str, layer: int, seed: int, count: int) -> Tensor:
    """The site's values at all tokens of so many prompts of all four templates, ``[tokens, W]``."""
    pairs = tasks.generate("ioi", model.tokenizer, count, seed=seed, templates="all")
    there = torch.arange(pairs.clean_tokens.shape[1]) <= pairs.last_position[:, None]
    return torch.cat(list(activations(model, pairs, site, layer)))[there]


def batches(values: Tensor, seed: int) -> Iterator[Tensor]:
    """Values drawn at random, for ever."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield values[torch.randint(len(values), (BATCH,), generator=draw)]


def train(values: Tensor, place: str, features: int, k: int, steps: int, seed: int) -> TopKTrainingSAE:
    """A TopK autoencoder (arXiv 2406.04093), whose decoder's rows have length 1."""
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=values.shape[1], d_sae=features, k=k))
    sae.cfg.metadata.hook_name = place
    with torch.no_grad():
        sae.b_dec.copy_(values.mean(0))
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-5,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=0,
        device="cpu",
        autocast=False,
        dead_feature_window=200,
        feature_sampling_window=1000,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = SAETrainer(config, sae, batches(values, seed)).fit()
    sae.fold_W_dec_norm()
    return sae


def write(out: Path, sae: TopKTrainingSAE) -> None:
    """In sae-lens's format, weights in half precision; the decoder's rows have length 1 and ask for no rescaling."""
    sae.cfg.rescale_acts_by_decoder_norm = False
    sae.to(dtype=torch.float16)
    sae.save_inference_model(out)


def main() -> None:
    """Train, write, and measure what is left unexplained on other prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--site", default="ssm_input")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, place = load_model(args.model), f"blocks.{args.layer}.hook_{args.site}"
    started = time.process_time()
    values = rows(model, args.site, args.layer, args.seed, PROMPTS)
    sae = train(values, place, args.features, args.k, args.steps, args.seed)
    write(args.out, sae)
    found = load_dictionary(args.out)
    other = rows(model, args.site, args.layer, args.seed + 1, PROMPTS // 4)
    features = found.encode(other)
    left = (other - found.decode(features)).pow(2).sum() / (other - other.mean(0)).pow(2).sum()
    print(f"{(time.process_time() - started) / 60:.1f} minutes of one core; {len(values)} tokens")
    print(
        f"held out: {1 - left:.4f} of the variance explained, {(features != 0).sum(1).float().mean():.1f} features "
        f"a token, {int((features != 0).any(0).sum())} of {args.features} active"
    )


if __name__ == "__main__":
    main()
