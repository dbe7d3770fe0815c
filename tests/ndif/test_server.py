"""Remote runs on a real NDIF server, which `server.sh` starts; trusted, and in its sandbox.

HF_ENDPOINT=http://127.0.0.1:9700 pytest tests/ndif
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import huggingface_hub
import nnsight
import pandas as pd
import pytest
import torch

from mamba_ioi import IOIDataset, Patch, cache, circuits, experiments, load_model, run
from mamba_ioi.cli import main
from mamba_ioi.interventions import sweep
from mamba_ioi.models.model import MambaModel
from mamba_ioi.remote import ndif
from mamba_ioi.remote import requests as remote
from mamba_ioi.result import Result
from mamba_ioi.trace.sites import SITES

URL = "http://127.0.0.1:8001"
KEYS = {"trusted": "11111111-1111-4111-8111-111111111111", "sandboxed": "22222222-2222-4222-8222-222222222222"}
RUN = Path(os.environ.get("NDIF_RUN", Path.home() / ".cache" / "mamba-ioi-ndif"))
SERVER = Path(__file__).with_name("server.sh")

nnsight.register(__name__.partition(".")[0])  # functions of this file travel too


@pytest.fixture(scope="session", autouse=True)
def hub() -> None:
    """The hub on loopback is the one that is asked, and no progress of requests is shown."""
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    assert huggingface_hub.constants.ENDPOINT == "http://127.0.0.1:9700", "start pytest with HF_ENDPOINT set to the hub"


@pytest.fixture(scope="session")
def local() -> MambaModel:
    """`tiny`, here."""
    return load_model("tiny")


@pytest.fixture(scope="session")
def data(local: MambaModel) -> IOIDataset:
    """Three pairs, in both directions."""
    return IOIDataset.generate(local.tokenizer, 3)


@pytest.fixture(params=KEYS)
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MambaModel:
    """`tiny` on the server, for a trusted caller and for another."""
    return served("tiny", request.param, monkeypatch)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> MambaModel:
    """`tiny` on the server, for a trusted caller."""
    return served("tiny", "trusted", monkeypatch)


def served(name: str, caller: str, monkeypatch: pytest.MonkeyPatch) -> MambaModel:
    """A model on the server."""
    use_key(KEYS[caller], monkeypatch)
    return load_model(f"mamba-ioi/{name}", remote=URL)


def use_key(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send requests with an API key."""
    monkeypatch.setattr("nnsight.schema.config.CONFIG.API.APIKEY", key)


def same(one: Result, other: Result) -> None:
    """Two results agree in every number."""
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=False, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Equal to local runs
# ---------------------------------------------------------------------------------------------------------------------


def read_each_site(model: MambaModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every site of layer 1 and outside the layers, each in a trace of its own."""
    found = {}
    for name, site in SITES.items():
        found |= cache(model, ids, [name if site.owner == "model" else (name, 1)])
    return found


def write_each_site(model: MambaModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits where each of those sites was written."""
    found = {}
    for name, site in SITES.items():
        patch = Patch(name, None if site.owner == "model" else 1, 0.1, [3, -1] if site.by_position else None)
        found[name] = run(model, ids, [patch])
    return found


@pytest.mark.parametrize(("caller", "layer"), [("trusted", 5), ("sandboxed", 4)])
def test_a_layer_that_no_request_has_looked_into(caller: str, layer: int, local, data, monkeypatch) -> None:
    """Its in_proj is read while its mixer already runs; conv and h come after. So this is the first test."""
    at = [("in_proj", layer), ("conv", layer), ("h", layer)]
    found = cache(served("tiny", caller, monkeypatch), data.clean_tokens, at)
    for key, value in cache(local, data.clean_tokens, at).items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("work", [read_each_site, write_each_site])
def test_every_site(work, there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    ids = data.clean_tokens[:2]
    found, expected = remote.ask(there, work, ids), work(local, ids)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_sites_one_after_another_in_one_trace(there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    ids = data.clean_tokens[:2]
    found, expected = cache(there, ids, list(SITES)), cache(local, ids, list(SITES))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_a_readers_own_trace(there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    state = torch.zeros(local.d_inner, local.d_state)

    def traced(model: MambaModel) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), model.trace(data.clean_tokens):
            layer = model.layers[2]
            entered = layer.in_proj.clone().save()
            layer.mixer.conv[:, 4] = 0.0
            h = layer.mixer.scan({5: state}).save()
            model.layers[3].mixer.conv1d.output = model.layers[3].mixer.conv1d.output * 2
            logits = model.lm_head.output[:, -1].save()
        return entered, h, logits

    for found, expected in zip(traced(there), traced(local), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "experiment",
    [
        lambda model, data: experiments.resample_ablation(model, data, progress=False),
        lambda model, data: experiments.resample_ablation(model, data, "h", positions=[2, 10, 19], progress=False),
        lambda model, data: experiments.conv_slices(model, data, progress=False),
        lambda model, data: experiments.cross_talk(model, data[:1], progress=False),
        lambda model, data: experiments.layer_removal(model, data, progress=False),
    ],
    ids=["fig4", "fig10", "fig8", "fig6", "fig5"],
)
def test_figures(experiment, there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    found, expected = experiment(there, data), experiment(local, data)
    same(found, expected)
    assert (found.meta["dtype"], found.meta["device"]) == ("torch.float32", URL)


def test_acdc_needs_no_gradients(there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    start = circuits.minimal_circuit(local, data, circuits.eap(local, data, steps=1))
    found, expected = (circuits.acdc(model, data[:2], start, 1e-2, fine=False) for model in (there, local))
    assert found.edges == expected.edges
    pd.testing.assert_frame_equal(found.table, expected.table, check_exact=False, rtol=0, atol=1e-5)


def test_eap_with_gradients(trusted: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    same(circuits.eap(trusted, data, fine=True), circuits.eap(local, data, fine=True))


@pytest.mark.parametrize("caller", KEYS)
def test_a_mamba2(caller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site, a patched run, a map, and for a trusted caller edges inside layers."""
    local, there = load_model("tiny-mamba2"), served("tiny-mamba2", caller, monkeypatch)
    pairs = IOIDataset.generate(local.tokenizer, 2)
    ids, sites = pairs.clean_tokens[:2], list(local.known_sites())
    found, expected = cache(there, ids, sites), cache(local, ids, sites)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)
    patches = [Patch("write", 2, 0.3, [4]), Patch("conv_slice", 3, 0.0, [7], -1, "B"), Patch("h", 4, 0.1, [9])]
    torch.testing.assert_close(run(there, ids, patches), run(local, ids, patches), rtol=0, atol=1e-4)
    same(*(experiments.resample_ablation(one, pairs, "h", layers=[2], progress=False) for one in (there, local)))
    if caller == "trusted":
        same(*(circuits.eap(one, pairs, steps=2, fine=True) for one in (there, local)))


def test_eap_in_a_sandbox(data: IOIDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served("tiny", "sandboxed", monkeypatch)
    assert not remote.serve(model).trusted
    before = model.remote.traffic.requests
    with pytest.raises(ValueError, match=r"needs gradients, which the sandbox of .* does not have: use acdc"):
        circuits.eap(model, data)
    assert model.remote.traffic.requests == before


# ---------------------------------------------------------------------------------------------------------------------
# Requests and bytes
# ---------------------------------------------------------------------------------------------------------------------


def test_figure_4_is_a_request_a_batch(trusted: MambaModel, local: MambaModel) -> None:
    data = IOIDataset.generate(local.tokenizer, 80)
    started = time.monotonic()
    found = experiments.resample_ablation(trusted, data, progress=False)
    traffic, seconds = trusted.remote.traffic, time.monotonic() - started
    logging.getLogger(__name__).warning("Figure 4 on tiny, 80 pairs: %s, %.1f s", traffic, seconds)
    same(found, experiments.resample_ablation(local, data, progress=False))
    patched = len(data) * local.n_layers * data.clean_tokens.shape[1]
    assert traffic.requests <= -(-patched // sweep.REQUEST_ROWS) + 2  # the corrupt runs, and what the server runs


def test_bytes_do_not_grow_with_the_model(data: IOIDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    traffics = {}
    for name in ("narrow", "wide"):
        model = served(name, "trusted", monkeypatch)
        experiments.resample_ablation(model, data, positions=[2, 10, 19], progress=False)
        experiments.resample_ablation(model, data, "h", positions=[2, 10, 19], progress=False)
        traffics[name] = model.remote.traffic
    narrow, wide = traffics.values()
    assert narrow.requests == wide.requests
    assert wide.sent == pytest.approx(narrow.sent, rel=0.02)
    assert wide.received < 1.25 * narrow.received  # effects of 16 times the width, compressed otherwise


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (None, "wants an API key: set NDIF_API_KEY"),
        ("33333333-3333-4333-8333-333333333333", "refuses the API key: check NDIF_API_KEY"),
        ("no-uuid-at-all", "refuses the API key: check NDIF_API_KEY"),
    ],
)
def test_keys(key: str | None, sentence: str, data: IOIDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("mamba-ioi/tiny", remote=URL)
    use_key(key, monkeypatch)
    with pytest.raises(ValueError, match=f"^{URL} {sentence}") as caught:
        cache(model, data.clean_tokens, ["embed"])
    assert key is None or key not in str(caught.value)


def test_a_model_that_cannot_be_deployed(data: IOIDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served("broken", "trusted", monkeypatch)
    with pytest.raises(ValueError, match=f"{URL} cannot run mamba-ioi/broken"):
        cache(model, data.clean_tokens, ["embed"])


def sleep(model: MambaModel, seconds: float) -> dict[str, torch.Tensor]:
    """A request that takes long."""
    import time

    time.sleep(seconds)
    return {}


def test_a_job_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError, match=f"the request ran longer than the 40.0 s that {URL} allows"):
        remote.ask(served("narrow", "trusted", monkeypatch), sleep, 90.0)


def test_the_server_is_killed_in_mid_sweep(
    trusted: MambaModel, local: MambaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = IOIDataset.generate(local.tokenizer, 20)
    monkeypatch.setattr(sweep, "REQUEST_ROWS", 256)
    monkeypatch.setattr(ndif, "TRIES", 2)
    killed_after = 4
    wait = ndif.Backend._wait

    def kill(backend, connection):
        if backend.traffic.requests == killed_after:
            os.killpg(int((RUN / "api.pid").read_text()), signal.SIGKILL)
        return wait(backend, connection)

    with monkeypatch.context() as patched:
        patched.setattr(ndif.Backend, "_wait", kill)
        with pytest.raises(ConnectionError, match=f"nothing answers at {URL}|the connection to {URL} was lost"):
            experiments.resample_ablation(trusted, data, progress=False)
    assert trusted.remote.traffic.requests == killed_after
    with pytest.raises(ConnectionError, match=f"nothing answers at {URL}: the NDIF server is down"):
        cache(trusted, data.clean_tokens, ["embed"])
    back = threading.Thread(target=lambda: subprocess.run([SERVER, "api"], check=True, stdout=subprocess.DEVNULL))
    back.start()
    back.join()
    found = experiments.resample_ablation(trusted, data, progress=False)
    same(found, experiments.resample_ablation(local, data, progress=False))
    whole = served("tiny", "trusted", monkeypatch)
    experiments.resample_ablation(whole, data, progress=False)
    assert trusted.remote.traffic.requests == whole.remote.traffic.requests


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", KEYS)
def test_doctor(caller: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    use_key(KEYS[caller], monkeypatch)
    assert main(["doctor", "--remote", URL, "--model", "mamba-ioi/tiny"]) == 0
    said = capsys.readouterr().out
    for words in ("answers", "nnsight", "of reader@example.org", "float32", "agrees on the server"):
        assert words in said
    assert ("trusted:" in said) == (caller == "trusted")
    assert ("in a sandbox:" in said) == (caller == "sandboxed")
    assert KEYS[caller] not in said


def test_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_key(KEYS["trusted"], monkeypatch)
    out = tmp_path / "out"
    command = ["reproduce", "--remote", URL, "--model", "mamba-ioi/tiny", "--pairs", "2", "--only", "fig4,appd2"]
    assert main([*command, "--out", str(out)]) == 0
    assert (out / "fig4.png").is_file()
    assert all(KEYS["trusted"].encode() not in file.read_bytes() for file in out.rglob("*") if file.is_file())
