"""Each family of hybrids on a server without this package."""

from __future__ import annotations

import pytest
from nnsight.modeling.huggingface import _ID_CACHE

from mamba_ioi import Patch, cache, hidden_attention, load_model, run, token_contributions
from mamba_ioi.circuits import Circuit, Graph, eap, evaluate
from mamba_ioi.experiments import resample_ablation
from mamba_ioi.remote import ndif

from .hybrid_models import FAMILIES, IDS, MODELS, close, short_pairs
from .plain import NAMES, prompt_tokenizer
from .test_remote import Worker


@pytest.mark.slow
@pytest.mark.conformance("remote")
@pytest.mark.parametrize("family", [name for name in FAMILIES if " " not in name])
def test_on_a_server(family, tmp_path, monkeypatch):
    here = MODELS[family]
    here._module.save_pretrained(tmp_path)
    prompt_tokenizer(NAMES).save_pretrained(tmp_path)
    worker = Worker(tmp_path)
    monkeypatch.setattr(ndif.Backend, "_exchange", lambda self, *request: worker.exchange(self, *request))
    monkeypatch.setitem(_ID_CACHE, str(tmp_path), f"random/{family}")
    there = load_model(tmp_path, remote=True)
    assert there.layer_kinds == here.layer_kinds
    for layer in range(here.n_layers):
        sites = [(name, layer) for name in here.sites_of(layer)]
        expected = cache(here, IDS, sites)
        for key, value in cache(there, IDS, sites).items():
            close(value, expected[key])
    for name in ("layer_input", "B", "h", "out_proj"):
        patch = [Patch(name, 0, 0.6, [2, 4])]
        close(run(there, IDS, patch), run(here, IDS, patch))
    for layer in [i for i in range(here.n_layers) if "attn_out" in here.sites_of(i)][:1]:
        for function in (hidden_attention, token_contributions):
            close(*(function(model, IDS, layer, part="attention") for model in (there, here)))
    for how in ({"parts": True}, {"fine": True, "positional": True, "ssm": "tokens"}):
        found, expected = (eap(model, short_pairs(), steps=2, **how).table.score for model in (there, here))
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
    circuit = Circuit.of(here, Graph(here.n_layers, fine=True).on(here).edges()[::2])
    found, expected = (evaluate(model, short_pairs(), circuit) for model in (there, here))
    assert (found.nld, found.kl) == pytest.approx((expected.nld, expected.kl), rel=1e-3, abs=1e-3)
    found, expected = (resample_ablation(model, short_pairs(), "resid_pre").table.effect for model in (there, here))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
    worker.process.kill()
