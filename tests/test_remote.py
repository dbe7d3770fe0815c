"""Remote runs on a process without this package, whose verdicts are those of a real server (tests/ndif)."""

from __future__ import annotations

import base64
import http.server
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pandas as pd
import pytest
import torch
import transformers
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling.huggingface import _ID_CACHE

from mamba_ioi import (
    IOIDataset,
    Patch,
    Splice,
    activations,
    cache,
    cache_to,
    circuits,
    experiments,
    generate,
    load_model,
    run,
)
from mamba_ioi.cli import main
from mamba_ioi.interventions import sweep
from mamba_ioi.models.model import MambaModel
from mamba_ioi.remote import ndif
from mamba_ioi.remote import requests as remote
from mamba_ioi.remote.traffic import Traffic
from mamba_ioi.result import Result
from mamba_ioi.trace.sites import SITES
from mamba_ioi.zoo import EMBEDDED

KEY = "33333333-3333-4333-8333-333333333333"


class Worker:
    """A server that is a process: what `Backend` sends goes to its standard input."""

    def __init__(self, folder: Path) -> None:
        script, packages = Path(__file__).with_name("strict_worker.py"), Path(transformers.__file__).parents[1]
        command = [sys.executable, "-I", str(script), str(folder), str(packages)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)
        assert self.process.stdout.readline() == "READY\n"

    def exchange(self, backend: ndif.Backend, request, blob: bytes):
        """What `Backend._exchange` does, without a network."""
        backend.traffic.sent += len(blob)
        self.process.stdin.write(base64.b64encode(blob).decode() + "\n")
        self.process.stdin.flush()
        verdict, _, content = self.process.stdout.readline().partition(" ")
        if verdict == "ERR":
            raise backend.fault(RemoteError(json.loads(content)))
        backend.traffic.requests += 1
        return backend.finalize(base64.b64decode(content))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """The server, with `tiny`."""
    worker = Worker(EMBEDDED["tiny"])
    yield worker
    worker.process.kill()


@pytest.fixture(scope="module")
def local() -> MambaModel:
    """`tiny`, here."""
    return load_model("tiny")


@pytest.fixture
def there(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> MambaModel:
    """`tiny`, on the server."""
    monkeypatch.setattr(ndif.Backend, "_exchange", lambda self, *request: worker.exchange(self, *request))
    return undispatched(monkeypatch)


def undispatched(monkeypatch: pytest.MonkeyPatch, target: bool | str = True) -> MambaModel:
    """`tiny` without weights, under a name that a Hub would know."""
    monkeypatch.setitem(_ID_CACHE, str(EMBEDDED["tiny"]), "mamba-ioi/tiny")
    return load_model("tiny", remote=target)


@pytest.fixture(scope="module")
def data(local: MambaModel) -> IOIDataset:
    """Two pairs, in both directions."""
    return IOIDataset.generate(local.tokenizer, 2)


@pytest.fixture(scope="module")
def ids(data: IOIDataset) -> torch.Tensor:
    """Two prompts' tokens."""
    return data.clean_tokens[:2]


def same(one: Result, other: Result) -> None:
    """Two results agree in every number."""
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=False, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What travels
# ---------------------------------------------------------------------------------------------------------------------


def test_a_layer_that_no_request_has_looked_into(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    """Its in_proj is read while its mixer already runs; conv and h come after."""
    at = [("in_proj", 5), ("conv", 5), ("h", 5)]
    found = cache(there, ids, at)
    for key, value in cache(local, ids, at).items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_the_server_has_no_mamba_ioi(there: MambaModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsight.ndif.pull_env", lambda: None)
    _PICKLE_BY_VALUE_MODULES.discard("mamba_ioi")
    try:
        with pytest.raises(RemoteError, match="No module named 'mamba_ioi'"):
            cache(there, ids, [("h", 1)])
    finally:
        _PICKLE_BY_VALUE_MODULES.add("mamba_ioi")


@pytest.mark.slow
def test_every_site_is_read_alone(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    for name, site in SITES.items():
        at = [name if site.owner == "model" else (name, 1)]
        for key, value in cache(local, ids, at).items():
            torch.testing.assert_close(cache(there, ids, at)[key], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_site_is_written(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    plain = run(local, ids)
    for name, site in SITES.items():
        patch = Patch(name, None if site.owner == "model" else 1, 0.1, [3, -1] if site.by_position else None)
        expected = run(local, ids, [patch])
        assert not torch.allclose(expected, plain, atol=1e-4), f"writing {name} changes nothing"
        torch.testing.assert_close(run(there, ids, [patch]), expected, rtol=0, atol=1e-5)


def test_generation(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    """Sites at every step, and the declared form, in one request each."""
    arguments = {"max_new_tokens": 4, "do_sample": False}
    found = []
    for model in (local, there):
        with torch.no_grad(), model.generate(ids, **arguments) as tracer:
            seen = list().save()
            for _ in tracer.iter[0:4]:
                model.layers[1].mixer.ssm_input[:, -1] += 2.0
                seen.append(model.layers[2].mixer.h[:, -1].clone())
            tokens = tracer.result.save()
        found.append((tokens, seen))
    assert torch.equal(found[0][0], found[1][0])
    for value, right in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-5)
    patches = {"patches": [Patch("h", 1, 0.5, [3])], "new_patches": [Patch("delta", 2, lambda delta: delta + 0.5)]}
    before = there.remote.traffic.requests
    assert torch.equal(generate(there, ids, 4, **patches), generate(local, ids, 4, **patches))
    assert there.remote.traffic.requests - before <= 2  # the model's check among them


class Halves(torch.nn.Module):
    """A dictionary with a feature for each dimension, half as large."""

    def __init__(self, width: int) -> None:
        torch.nn.Module.__init__(self)
        self.scale = torch.nn.Parameter(torch.full((width,), 0.5))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale

    def decode(self, found: torch.Tensor) -> torch.Tensor:
        return found / self.scale


def test_splices(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    sae = Halves(local.d_inner)
    patch = Patch("ssm_input", 2, Splice(sae, features=[3, 5], value=1.0), [4, 7])
    expected = run(local, ids, [patch])
    assert not torch.allclose(expected, run(local, ids), atol=1e-3)
    torch.testing.assert_close(run(there, ids, [patch]), expected, rtol=0, atol=1e-5)
    new = [Patch("ssm_input", 3, Splice(sae, False, [1, 2]))]
    assert torch.equal(generate(there, ids, 3, new_patches=new), generate(local, ids, 3, new_patches=new))


@pytest.mark.slow
def test_effects_of_features(there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    """The dictionary stays here."""
    arguments = {"sae": Halves(local.d_inner), "site": "ssm_input", "layer": 2, "top": 2, "steps": 2, "progress": False}
    found, expected = (
        Result(result.table.sort_values("feature", ignore_index=True), result.meta)
        for result in (experiments.feature_effects(model, data[:2], **arguments) for model in (there, local))
    )
    assert expected.table.estimate.abs().max() > 1e-3
    same(found, expected)
    sides = [(Halves(local.d_inner), site, 2) for site in ("ssm_input", "y")]
    top = {"sources": list(range(8)), "targets": [3], "steps": 2, "progress": False}
    found, expected = (
        Result(result.table.sort_values("source", ignore_index=True), result.meta)
        for result in (experiments.feature_edges(model, data[:2], *sides, **top) for model in (there, local))
    )
    assert expected.table.estimate.abs().max() > 1e-3
    same(found, expected)


def test_means_and_what_is_added(there: MambaModel, local: MambaModel, data: IOIDataset, ids: torch.Tensor) -> None:
    found, expected = (
        experiments.means(model, data, "h", 2, "n1+1", by="n1", progress=False) for model in (there, local)
    )
    assert found.labels == expected.labels and found.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
    vector = 3 * (expected.values[0] - expected.values[1])
    patch = Patch("h", 2, vector, [4], add=True)
    steered = run(local, ids, [patch])
    assert not torch.allclose(steered, run(local, ids), atol=1e-3)
    torch.testing.assert_close(run(there, ids, [patch]), steered, rtol=0, atol=1e-5)
    assert torch.equal(generate(there, ids, 2, patches=[patch]), generate(local, ids, 2, patches=[patch]))


def test_the_lens_and_direct_effects(there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    same(*(experiments.logit_lens(model, data, marks=["last"]) for model in (there, local)))
    for by in ("layer", "token"):
        arguments = {} if by == "layer" else {"layers": [1]}
        same(*(experiments.direct_effects(model, data, by, **arguments) for model in (there, local)))


def test_activations_in_batches_and_in_a_folder(
    there: MambaModel, local: MambaModel, data: IOIDataset, tmp_path: Path
) -> None:
    expected = cache(local, data.clean_tokens, [("h", 2)], positions=[4, -1])
    parts = list(activations(there, data, "h", 2, positions=[4, -1], batch_rows=3))
    assert [len(part) for part in parts] == [3, 1]
    torch.testing.assert_close(torch.cat(parts), expected["h", 2], rtol=0, atol=1e-5)
    stored = cache_to(tmp_path, there, data, [("h", 2)], positions=[4, -1], batch_rows=3, progress=False)
    torch.testing.assert_close(stored["h", 2], expected["h", 2], rtol=0, atol=1e-5)


def test_all_sites_in_one_trace(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    found, expected = cache(there, ids, list(SITES)), cache(local, ids, list(SITES))
    assert list(found) == list(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)
    assert there.remote.traffic.requests == 1


def test_a_readers_own_trace(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    state = torch.zeros(local.d_inner, local.d_state)

    def traced(model: MambaModel) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), model.trace(ids):
            layer = model.layers[2]
            entered = layer.in_proj.clone().save()
            layer.mixer.conv[:, 4] = 0.0
            h = layer.mixer.scan({5: state}).save()
            model.layers[3].mixer.conv1d.output = model.layers[3].mixer.conv1d.output * 2
            logits = model.lm_head.output[:, -1].save()
        return entered, h, logits

    for found, expected in zip(traced(there), traced(local), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_name_that_is_no_site(there: MambaModel, local: MambaModel, ids: torch.Tensor) -> None:
    with pytest.raises(RemoteError, match=r"is model.backbone.layers\[2\].mixer.ssm_input meant"), there.trace(ids):
        there.layers[2].mixer.ssm_inputs = 0.0
    value = cache(local, ids, [("skip", 2)])["skip", 2] * 2
    with torch.no_grad(), there.trace(ids):
        there.layers[2].mixer.skip = value
        logits = there.logits[:, -1].save()
    torch.testing.assert_close(logits, run(local, ids, [Patch("skip", 2, value)]), rtol=0, atol=1e-5)


def test_texts_are_padded_on_the_right(there: MambaModel, local: MambaModel) -> None:
    """The server's own tokenizer pads on the left."""
    texts = ["When John and Mary went to the shop", "Then Mary", "Anna and"]
    expected = run(local, texts, positions="all")
    with torch.no_grad(), there.trace(texts):
        logits = there.logits.save()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    found = {}
    with torch.no_grad(), there.trace() as tracer:
        with tracer.invoke(texts[:2]):
            found["first"] = there.logits.save()
        with tracer.invoke(texts[2]):
            found["last"] = there.logits.save()
        found = found.save()
    torch.testing.assert_close(torch.cat([found["first"], found["last"]]), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    [
        lambda model, data: experiments.resample_ablation(model, data, progress=False),
        lambda model, data: experiments.resample_ablation(model, data, "h", [1, 4], progress=False),
        lambda model, data: experiments.conv_slices(model, data, progress=False),
        lambda model, data: experiments.cross_talk(model, data[:1], progress=False),
        lambda model, data: experiments.layer_removal(model, data, progress=False),
        lambda model, data: experiments.state_similarity(model, data.clean_text[0], 1, progress=False),
        lambda model, data: experiments.name_steering(model, 1, n_pairs=200, n_test=3, progress=False),
        lambda model, data: circuits.eap(model, data, steps=2, fine=True),
        lambda model, data: circuits.eap(model, data, steps=2, variant="paper", positional=True),
        lambda model, data: circuits.eap(model, data, steps=2, fine=True, marks=["n1", "n4+1", "last"]),
    ],
    ids=["fig4", "fig10", "fig8", "fig6", "fig5", "fig7", "fig9", "eap", "eap_paper", "eap_marks"],
)
def test_experiments_agree_with_local_ones(experiment, there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    found, expected = experiment(there, data), experiment(local, data)
    same(found, expected)
    assert found.meta["dtype"] == "torch.float32"
    assert found.meta["device"] == str(there.remote)


@pytest.mark.slow
def test_circuits_agree_with_local_ones(there: MambaModel, local: MambaModel, data: IOIDataset) -> None:
    scores = circuits.eap(local, data, steps=1)
    start = circuits.minimal_circuit(local, data, scores)
    assert circuits.minimal_circuit(there, data, scores).edges == start.edges
    found, expected = (circuits.acdc(model, data, start, 1e-2, ssm="states") for model in (there, local))
    assert found.edges == expected.edges
    found, expected = (circuits.acdc(model, data, start, 1e-2) for model in (there, local))
    assert found.edges == expected.edges
    pd.testing.assert_frame_equal(found.table, expected.table, check_exact=False, rtol=0, atol=1e-5)
    one, other = (circuits.evaluate(model, data, start) for model in (there, local))
    assert one.kl == pytest.approx(other.kl, abs=1e-5)
    assert one.random.nld == pytest.approx(other.random.nld, abs=1e-5)


def test_no_gradients_in_a_sandbox(there: MambaModel, data: IOIDataset) -> None:
    there.remote.served = remote.Served(torch.float32, trusted=False, difference=0.0)
    with pytest.raises(ValueError, match=r"needs gradients, which the sandbox of .* does not have: use acdc"):
        circuits.eap(there, data)
    assert there.remote.traffic.requests == 0


def test_the_slow_path_is_checked_on_the_server(there: MambaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= remote.serve(there).difference < 1e-5
    there.remote.served = None
    monkeypatch.setattr("mamba_ioi.models.slow_path.slow_path_tolerance", lambda dtype: -1.0)
    with pytest.raises(ValueError, match=r"the slow path does not reproduce .*the first site that differs"):
        remote.serve(there)


# ---------------------------------------------------------------------------------------------------------------------
# Requests, and what is kept of them
# ---------------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_request_a_batch(there: MambaModel, data: IOIDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    experiments.resample_ablation(there, data, progress=False)
    assert there.remote.traffic.requests == 3  # what the server runs, the patched runs, the corrupt runs
    monkeypatch.setattr(sweep, "REQUEST_ROWS", 100)
    again = undispatched(monkeypatch)
    experiments.resample_ablation(again, data, progress=False)
    rows = len(data) * (1 + 6 * data.clean_tokens.shape[1])
    assert 3 < again.remote.traffic.requests <= 2 + -(-rows // 100)


def test_what_was_answered_is_kept(
    there: MambaModel, local: MambaModel, data: IOIDataset, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "REQUEST_ROWS", 50)
    monkeypatch.setattr(ndif, "TRIES", 1)
    with lost_after(3, worker, monkeypatch), pytest.raises(ConnectionError, match="was lost"):
        experiments.resample_ablation(there, data, progress=False)
    assert there.remote.traffic.requests == 3
    found = experiments.resample_ablation(there, data, progress=False)
    same(found, experiments.resample_ablation(local, data, progress=False))
    all_at_once = undispatched(monkeypatch)
    experiments.resample_ablation(all_at_once, data, progress=False)
    assert there.remote.traffic.requests == all_at_once.remote.traffic.requests


@pytest.mark.slow
def test_another_process_goes_on(
    there: MambaModel, data: IOIDataset, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "REQUEST_ROWS", 50)
    monkeypatch.setattr(ndif, "TRIES", 1)
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    command = ["reproduce", "--remote", "http://127.0.0.1:9", "--only", "fig4", "--pairs", "2", "--out", str(tmp_path)]
    with lost_after(3, worker, monkeypatch):
        assert main(command) == 2
    kept = list((tmp_path / "results").glob("*/answers/*"))  # of the bottleneck, which is chosen first
    assert len(kept) == 2  # the third was what the server runs
    assert all(file.suffix == ".safetensors" and KEY.encode() not in file.read_bytes() for file in kept)
    before = {file: file.stat().st_mtime_ns for file in kept}
    with lost_after(1, worker, monkeypatch):
        assert main(command) == 2
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    assert main(command) == 0
    assert not list((tmp_path / "results").glob("*/answers"))
    made = Result.load(tmp_path / "results" / "fig4")
    assert made.meta["request"]["remote"] == "http://127.0.0.1:9"
    assert KEY not in (tmp_path / "results" / "fig4" / "meta.json").read_text()


class lost_after:
    """Lose the connection after so many requests."""

    def __init__(self, count: int, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.worker, self.monkeypatch = count, worker, monkeypatch

    def __enter__(self) -> None:
        self.monkeypatch.setattr(ndif.Backend, "_exchange", lambda backend, *request: self.exchange(backend, *request))

    def __exit__(self, *error) -> None:
        worker = self.worker
        self.monkeypatch.setattr(
            ndif.Backend, "_exchange", lambda backend, *request: worker.exchange(backend, *request)
        )

    def exchange(self, backend: ndif.Backend, request, blob: bytes):
        if not self.left:
            raise backend.fault(ConnectionResetError("Connection reset by peer"))
        self.left -= 1
        return self.worker.exchange(backend, request, blob)


def test_transient_faults_are_tried_again(
    there: MambaModel, ids: torch.Tensor, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    cache(there, ids, ["embed"])
    monkeypatch.setattr(ndif, "LONGEST_WAIT", 0.01)
    faults = [ConnectionResetError("reset"), RemoteError("Replica was evicted while processing your request.")]

    def exchange(backend, *request):
        if faults:
            raise backend.fault(faults.pop(0))
        return worker.exchange(backend, *request)

    monkeypatch.setattr(ndif.Backend, "_exchange", exchange)
    with caplog.at_level(logging.WARNING):
        cache(there, ids, ["embed"])
    assert not faults
    assert [record.message.partition(";")[2] for record in caplog.records] == [" trying again in 0 s"] * 2


def test_a_request_that_takes_too_long_is_cut(
    there: MambaModel, local: MambaModel, data: IOIDataset, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def exchange(backend, request, blob):
        asked.append(len(blob))
        if len(asked) in (2, 3):
            raise backend.fault(RemoteError("Your job exceeded the execution timeout of 60.0s."))
        return worker.exchange(backend, request, blob)

    monkeypatch.setattr(ndif.Backend, "_exchange", exchange)
    found = experiments.resample_ablation(there, data, progress=False)
    same(found, experiments.resample_ablation(local, data, progress=False))
    assert len(asked) == 1 + 2 + 3 + 1  # probe; two that took too long; a half and two quarters; the corrupt runs


def test_what_is_asked_has_one_digest(there: MambaModel, ids: torch.Tensor) -> None:
    def of(*arguments):
        return remote.digest("tiny", there, test_what_is_asked_has_one_digest, arguments)

    patch = Patch("h", 1, torch.ones(2), [3])
    assert of(ids, [patch], {"a": None}) == of(ids.clone(), [Patch("h", 1, torch.ones(2), [3])], {"a": None})
    others = [of(ids, [patch]), of(ids[:1]), of(ids, [Patch("h", 1, torch.zeros(2), [3])]), of(1), of(True), of("1")]
    assert len(set(others)) == len(others)

    def scaled(factor):
        return lambda value: value * factor

    assert of(scaled(2)) == of(scaled(2)) != of(scaled(3))
    with pytest.raises(TypeError, match="a object cannot be part of what is asked"):
        of(object())


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> str:
    """The URL of a port where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[tuple[str, dict]]:
    """A web server that answers every request alike: its URL, and what it answers."""
    answer = {"status": 404, "body": b"not here"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()


def test_server_down(nobody: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match=f"nothing answers at {nobody}: the NDIF server is down"):
        cache(undispatched(monkeypatch, nobody), ids, ["embed"])


def test_unknown_host(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match=r"the host of http://nowhere.invalid is not known"):
        cache(undispatched(monkeypatch, "http://nowhere.invalid"), ids, ["embed"])


def test_no_ndif_server(answering, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = answering
    with pytest.raises(ValueError, match=f"{url} answers, but not as an NDIF server"):
        cache(undispatched(monkeypatch, url), ids, ["embed"])


@pytest.mark.parametrize("remote", ["example.org", "ftp://example.org", "http://reader:secret@example.org", "http://"])
def test_no_url(remote: str) -> None:
    with pytest.raises(ValueError, match="remote is True, or the URL of an NDIF server"):
        load_model("tiny", remote=remote)


def test_a_folder_has_no_name_on_a_server(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="is no id of a model on the Hub"):
        cache(load_model("tiny", remote=True), ids, ["embed"])


@pytest.mark.parametrize(
    ("status", "detail", "kind", "sentence"),
    [
        (401, "Missing or invalid API key.", ValueError, "refuses the API key: check NDIF_API_KEY"),
        (403, "Invalid API key.", ValueError, "refuses the API key: check NDIF_API_KEY"),
        (400, f"Invalid API key format: '{KEY}'.", ValueError, "refuses the API key: check NDIF_API_KEY"),
        (400, "Client nnsight version 0.8.1 is below 0.9.", ValueError, "refuses the request: Client nnsight version"),
        (503, "Auth backend unavailable.", ConnectionError, "is not ready: Auth backend unavailable."),
    ],
)
def test_refusals(status: int, detail: str, kind: type, sentence: str) -> None:
    backend = ndif.Backend("", "http://server", Traffic(), quiet=True, env={})
    backend.api_key = KEY
    response = httpx.Response(status, request=httpx.Request("POST", "http://server/request"))
    error = RemoteError(f"Failed to send request: {detail}")
    error.__cause__ = httpx.HTTPStatusError("", request=response.request, response=response)
    fault = backend.fault(error)
    assert type(fault) is kind
    assert str(fault).startswith(f"http://server {sentence}")
    assert KEY not in str(fault)


@pytest.mark.parametrize(
    "description",
    [
        "Could not deploy this model. CANT_ACCOMMODATE: placed 0 of 1 new replicas",
        "Error starting model. Please try again later. Sorry for the inconvenience.",
    ],
)
def test_a_model_that_cannot_be_deployed(description: str) -> None:
    key = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "mamba-ioi/tiny", "revision": null}'
    backend = ndif.Backend(key, "http://server", Traffic(), quiet=True, env={})
    fault = backend.fault(RemoteError(f"job 7 failed:\n{description}\n"))
    assert type(fault) is ValueError
    assert str(fault) == f"http://server cannot run mamba-ioi/tiny: {description}"


def test_the_key_is_in_no_message(
    ids: torch.Tensor, answering, monkeypatch: pytest.MonkeyPatch, caplog, capsys
) -> None:
    url, answer = answering
    answer.update(status=500, body=KEY.encode())
    monkeypatch.setattr("nnsight.schema.config.CONFIG.API.APIKEY", KEY)
    with caplog.at_level(logging.DEBUG), pytest.raises(ConnectionError) as caught:
        cache(undispatched(monkeypatch, url), ids, ["embed"])
    assert main(["run", "resample_ablation", "--remote", url, "--verbose"]) == 2
    said = capsys.readouterr()
    assert "is not ready" in str(caught.value)
    assert all(KEY not in text for text in (repr(caught.value), caplog.text, said.out, said.err))


def test_the_command_line_says_it_in_one_line(nobody: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(_ID_CACHE, str(EMBEDDED["tiny"]), "mamba-ioi/tiny")
    out = ["--out", str(tmp_path / "out")]
    for command in (["reproduce", *out], ["run", "layer_removal", *out], ["doctor"]):
        assert main([*command, "--remote", nobody]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["reproduce", "--remote", nobody, "--dtype", "bfloat16"]) == 2
    assert "--device and --dtype have no meaning with --remote" in capsys.readouterr().err


def test_precisions_do_not_mix(there: MambaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["reproduce", "--remote", "http://127.0.0.1:9", "--pairs", "1", "--out", str(tmp_path), "--only"]
    assert main([*command, "fig4"]) == 0
    path = tmp_path / "results" / "fig4" / "meta.json"
    meta = json.loads(path.read_text())
    assert meta["dtype"] == "torch.float32"
    path.write_text(json.dumps(meta | {"dtype": "torch.bfloat16"}))
    assert main([*command, "fig4,fig11"]) == 2
    assert "computed in torch.bfloat16, and http://127.0.0.1:9 computes in torch.float32" in capsys.readouterr().err
    assert main(["reproduce", "--pairs", "1", "--out", str(tmp_path), "--only", "fig4"]) == 2
    assert "remote=http://127.0.0.1:9" in capsys.readouterr().err


def test_version_notes(there: MambaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Differing:
        critical_mismatches = {"nnsight": {"remote": "0.7.0", "local": "0.8.1"}}  # noqa: RUF012

    monkeypatch.setattr(ndif, "compare", lambda host: Differing)

    with pytest.raises(ValueError, match=r"failed on .*: ZeroDivisionError: .*; it has nnsight 0.7.0, here is 0.8.1"):
        remote._send(there, divide, ())


def divide(model: MambaModel) -> dict[str, torch.Tensor]:
    """A request that fails."""
    return {"none": torch.tensor(1 // (model.n_layers - model.n_layers))}
