"""A trained hybrid: which of its parts moves the name, attention or state?

Trains a Bamba of Mamba-2 layers and one attention layer on the indirect-object task, by what `mamba-ioi train-tiny`
trains with, and asks each of its parts. `docs/how-to/hybrid.md` tells what came out; this prints it:

    python benchmarks/hybrid.py OUT [--attention 2] [--seed 0] [--steps 1200] [--pairs 20]

A folder OUT that holds a model is not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from transformers import BambaConfig, BambaForCausalLM

from mamba_ioi import IOIDataset, experiments, load_model
from mamba_ioi.circuits import eap, exact_effects, rank_correlation
from mamba_ioi.circuits.graph import is_inner
from mamba_ioi.zoo.train_tiny import Recipe, train
from mamba_ioi.zoo.training import hf_logits

LAYERS = 4
PARTS = {"": ("layer_input", "out_proj"), ".attn": ("attn_in", "attn_out"), ".mlp": ("mlp_in", "mlp_out")}


def recipe(attention: int) -> Recipe:
    """A Bamba whose layer ``attention`` is attention."""

    def build(vocab_size: int) -> BambaForCausalLM:
        config = BambaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            attn_layer_indices=[attention],
            num_attention_heads=4,
            num_key_value_heads=4,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=32,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return BambaForCausalLM(config)

    made = f"An example, made by `python benchmarks/hybrid.py --attention {attention} --seed {{seed}}`."
    sizes = f"`BambaForCausalLM`, {LAYERS} layers, layer {attention} attention, d_model 64, d_state 16, float32,\n "
    return Recipe("tiny-hybrid", "Bamba", made, sizes, build, hf_logits)


def main() -> None:
    """Train, and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("attention", 2), ("seed", 0), ("steps", 1200), ("pairs", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if not (given.out / "config.json").is_file():
        report = train(given.out, family=recipe(given.attention), seed=given.seed, steps=given.steps)
        print(f"trained in {report['minutes']} minutes; held-out accuracy by template:")
        print([one["candidates"] for one in report["held_out"]])
    model = load_model(given.out)
    print(", ".join(f"{layer} {kind}" for layer, kind in enumerate(model.layer_kinds)))
    data = IOIDataset.generate(model.tokenizer, given.pairs, corruptions=["ABC AB C -> ABD AB D"])
    with pd.option_context("display.width", 150, "display.max_columns", 20, "display.float_format", "{:.2f}".format):
        for side, what in enumerate(("reads", "gives")):
            print(f"\neffect of resampling what each part {what}, by position:")
            print(by_position(model, data, side))
        sources = ["n3", "n3+1", "n3+2", "n3+3"]
        cut = experiments.knockout(model, data, sources=sources, targets=["last"], progress=False)
        print("\neffect of cutting the name's token, or one of three after it, from the last one in each scan:")
        print(cut.table.pivot(index="layer", columns="source", values="effect").to_string())
        scores, effects = eap(model, data, parts=True, steps=5), exact_effects(model, data, parts=True)
        agreed = rank_correlation(scores, effects)
        print(f"\nedges between parts, the most needed first (rank correlation with eap {agreed:.2f}):")
        print(effects.table.sort_values("score").head(10)[["src", "dst", "score"]].to_string(index=False))
        scores, effects = eap(model, data, fine=True, steps=5), exact_effects(model, data, fine=True)
        agreed, inner = rank_correlation(scores, effects), effects.table[effects.table.src.map(is_inner)]
        inner = pd.concat([inner, effects.table[effects.table.dst.map(is_inner)]]).drop_duplicates()
        print(f"\nedges inside mixers, of {len(effects.table)} in all (rank correlation with eap {agreed:.2f}):")
        print(inner.sort_values("score").head(8)[["src", "dst", "score"]].to_string(index=False))


def by_position(model, data: IOIDataset, side: int) -> pd.DataFrame:
    """The effect of each part's input (0) or output (1) at each position: a row a part, a column a position."""
    rows = {}
    for end, sites in PARTS.items():
        layers = [layer for layer in range(model.n_layers) if sites[side] in model.sites_of(layer)]
        table = experiments.resample_ablation(model, data, site=sites[side], layers=layers, progress=False).table
        for layer, some in table.groupby("layer"):
            places = some.position.astype(str) + " " + some.label
            rows[f"{layer}{end}"] = some.effect.set_axis(places)
    found = pd.DataFrame(rows).T.sort_index()
    return found.loc[:, found.abs().max() > 0.02]


if __name__ == "__main__":
    main()
