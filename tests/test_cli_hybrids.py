"""What the command line says of hybrids: their family, and which of their layers have which sites."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BambaConfig, BambaForCausalLM

from mamba_ioi.cli import main
from mamba_ioi.doctor import numbered

from .hybrid_models import BASE, HEADS, MAMBA, MODELS, build

LAYERS = {
    "jamba": "layer 0 mamba+mlp; layers 1, 3 mamba+moe; layer 2 attention+mlp",
    "zamba2": "layers 0, 2 mamba2; layers 1, 3 attention+mlp+mamba2",
    "falcon_h1": "layers 0-2 mamba2+attention+mlp",
    "nemotron_h": "layers 0, 2 mamba2; layer 1 attention; layer 3 mlp",
}
SIZES = {
    "jamba": "D d_model = 16, E d_inner = 32, N d_state = 4, R dt_rank = 3, K taps of the conv = 4, V vocabulary = 61",
    **dict.fromkeys(
        ("zamba2", "falcon_h1", "nemotron_h"),
        "D d_model = 16, E d_inner = 32, N d_state = 4, H heads = 4, P head_dim = 8, G groups of heads that share B "
        "and C = 2, X channels of the conv (E + 2GN) = 48, K taps of the conv = 4, V vocabulary = 61",
    ),
}
WHERE = {
    "jamba": {"h": "0-1, 3", "attn_in": "2", "mlp_out": "all", "delta_1": "0-1, 3", "embed": ""},
    "zamba2": {"h": "all", "resid_post": "all", "logits": ""},
    "falcon_h1": {"h": "all", "attn_out": "all", "mlp_in": "all", "resid_mid": "all"},
    "nemotron_h": {"h": "0, 2", "attn_out": "1", "mlp_in": "3", "resid_pre": "all"},
}


@pytest.fixture(scope="module", params=LAYERS)
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    """A family's name, and the folder of a model of it, without a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder)
    return request.param, folder


def test_doctor(saved, capsys):
    family, folder = saved
    assert main(["doctor", "--model", str(folder)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["family"] == f"{family}: {SIZES[family]}"
    assert said["layers"] == LAYERS[family]
    assert "operations that the" in said["transformers'"] and "agrees" in said["slow"]
    assert said["all"] == "is well"


def test_sites(saved, capsys):
    family, folder = saved
    assert main(["list", "--sites", "--model", str(folder)]) == 0
    head, *lines, kinds, sizes = capsys.readouterr().out.splitlines()
    assert kinds == f"{family}: {LAYERS[family]}" and SIZES[family].split(", V")[0] in sizes
    start, end = head.index("layers"), head.index("what it is")
    rows = {line.split()[0]: line[start:end].strip() for line in lines}
    assert WHERE[family].items() <= rows.items()
    model = MODELS[family]
    assert next(iter(rows)) == "embed" and list(rows)[-2:] == ["norm", "logits"]
    for layer in range(model.n_layers):  # every layer's sites are there, in its order
        assert [name for name in rows if name in model.sites_of(layer)] == model.sites_of(layer)


def test_a_hybrid_that_begins_without_a_scan(tmp_path, capsys):
    sizes = BASE | MAMBA | HEADS
    BambaForCausalLM(BambaConfig(**sizes, num_hidden_layers=3, attn_layer_indices=[0, 1])).save_pretrained(tmp_path)
    assert main(["doctor", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "layers 0-1 attention+mlp; layer 2 mamba2+mlp" in said and "agrees" in said


def test_layers_that_follow_one_another():
    assert numbered([4, 0, 1, 2, 6, 7]) == "0-2, 4, 6-7"
