"""`mamba-ioi bench`: the shapes are those of the real models, and every piece of work runs on every family."""

from __future__ import annotations

import re

import pytest
import torch

from mamba_ioi import bench
from mamba_ioi.arguments import parse
from mamba_ioi.cli import COMMANDS, main
from mamba_ioi.zoo import shapes


@pytest.mark.parametrize(
    ("family", "layers", "D", "R", "V", "heads", "billions"),
    [("mamba", 48, 1024, 64, 50280, 1, 0.37), ("falcon_mamba", 64, 4096, 256, 65024, 2, 7.27)],
)
def test_the_shapes_are_those_of_the_real_models(
    family: str, layers: int, D: int, R: int, V: int, heads: int, billions: float
) -> None:
    """Counted by hand: in_proj, conv, x_proj, dt_proj, A, D, out_proj and norm of each layer; embeddings and norm."""
    E, N, K = 2 * D, 16, 4
    layer = 2 * E * D + E * (K + 1) + E * (R + 2 * N) + E * (R + 1) + E * (N + 1) + E * D + D
    by_hand = layers * layer + heads * V * D + D
    _, kind, settings, sizes = shapes.SHAPES[family]
    with torch.device("meta"):
        module = kind(settings(**sizes))
    assert sum(parameter.numel() for parameter in module.parameters()) == by_hand
    assert by_hand / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_command_line_knows_every_shape() -> None:
    for family in shapes.SHAPES:
        assert parse(COMMANDS, ["bench", "--family", family]).family == family
    with pytest.raises(ValueError, match="there are the shapes of mamba and mamba2 and falcon_mamba to measure"):
        bench.of_shape("gpt2")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_every_work_runs_on_a_small_model_of_the_family(family: str, monkeypatch, capsys) -> None:
    name, kind, settings, sizes = shapes.SHAPES[family]
    small = {"hidden_size": 32, "vocab_size": 600, "time_step_rank": 4, "num_heads": 4, "head_dim": 16}
    sizes = {key: small.get(key, size) for key, size in sizes.items()}
    monkeypatch.setitem(shapes.SHAPES, family, (name, kind, settings, sizes))
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    works = [name for name in bench.WORKS if name != "import"]
    words = ["bench", "--family", family, "--layers", "3", "--prompts", "4", "--only", ",".join(works)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(re.match(r".{36,} +-?\d+\.\d{3} of .* \(.*\)$", line) for line in said.splitlines())
    for work in (
        "traced forward of 4 prompts",
        "resample h",
        "EAP, 5 steps",
        "ACDC, a tested edge",
        "cost by layers",
        "hidden_attention, a layer",
    ):
        assert work in said
    model = bench.of_shape(family, 3)
    assert model.n_layers == 3 and model.family == family and name in model.model_id
