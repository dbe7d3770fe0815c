"""The memory that an experiment may use sets how many rows run at once, and no result."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from mamba_ioi import circuits, experiments, memory
from mamba_ioi.circuits.measure import References, reference_bytes
from mamba_ioi.circuits.pairs import Pairs
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset

from .conftest import RANDOM
from .plain import NAMES, prompt_tokenizer

TOKENIZER = prompt_tokenizer(NAMES)


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    module = RANDOM[request.param](seed=2, dtype=torch.float64, vocab_size=len(TOKENIZER))
    return wrap(module, TOKENIZER, model_id="random")


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 3, seed=27)


@pytest.fixture(scope="module")
def scores(model: MambaModel, data: IOIDataset):
    return circuits.eap(model, data)


def means(model, data, scores) -> pd.DataFrame:
    found = experiments.name_means(model, 1, 40, progress=False)
    return pd.DataFrame(found.means.flatten(1).numpy()).assign(n=found.counts.sum(1).numpy())


WORKS: dict[str, Callable] = {
    "layer_removal": lambda model, data, scores: experiments.layer_removal(model, data, progress=False).table,
    "greedy_layer_removal": lambda model, data, _: experiments.greedy_layer_removal(model, data, progress=False).table,
    "resample_ablation": lambda model, data, _: experiments.resample_ablation(model, data, progress=False).table,
    "cross_talk": lambda model, data, _: experiments.cross_talk(model, data, progress=False).table,
    "conv_slices": lambda model, data, _: experiments.conv_slices(model, data, 1, progress=False).table,
    "name_means": means,
    "name_steering": lambda model, *_: experiments.name_steering(model, 1, 40, 5, progress=False).table,
    "exact_effects": lambda model, data, _: circuits.exact_effects(model, data).table,
    "eap": lambda model, data, _: circuits.eap(model, data, positional=True, fine=True).table,
    "minimal_circuit": lambda model, data, scores: circuits.minimal_circuit(model, data, scores).table,
    "acdc": lambda model, data, _: circuits.acdc(model, data).table,
    "acdc of states": lambda model, data, _: circuits.acdc(model, data, ssm="states").table,
    "faithfulness": lambda model, data, scores: circuits.faithfulness(model, data, scores).table,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_the_memory_changes_no_result(name, model, data, scores, monkeypatch) -> None:
    work, asked = WORKS[name], []
    whole = work(model, data, scores)
    inside = memory.budget
    monkeypatch.setattr(model, "memory", 1)
    monkeypatch.setattr(memory, "budget", lambda model: asked.append(inside(model)) or asked[-1])
    one_at_a_time = work(model, data, scores)
    assert set(asked) == {1}, "the work sizes its batches by the memory"
    assert len(whole) > 1
    pd.testing.assert_frame_equal(one_at_a_time, whole, check_exact=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimate", ["eap", "attribution"])
def test_what_a_gradient_pass_keeps_is_estimated(model, data, estimate, monkeypatch) -> None:
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model._module.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    one = data[:1]
    monkeypatch.setattr(model, "memory", 1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if estimate == "eap":
            circuits.eap(model, one, steps=1)
        else:
            experiments.resample_ablation(model, one, layers=[0], estimate="attribution", progress=False)
    floats = sum(kept.values()) / 2  # this model's are float64, the estimate is of float32
    skipped = int((one.clean_tokens != one.corrupt_tokens)[0].nonzero()[0]) if estimate == "eap" else 0
    estimated = memory.backward_bytes(model, one.clean_tokens.shape[1] - skipped)
    estimated += 2 * memory.state_bytes(model) if skipped else 0
    assert estimated / 4 < floats < estimated


@pytest.mark.parametrize("ssm", ["conv", "states"])
@pytest.mark.parametrize("fine", [False, True])
def test_what_is_held_of_a_prompt_is_estimated(model, data, fine: bool, ssm: str) -> None:
    graph = circuits.Graph(model.n_layers, fine, None, ssm)
    pairs = Pairs.of(model, data)
    held = References.of(model, graph, pairs, torch.ones(len(graph.pairs), 1, dtype=torch.bool))
    pieces = [tensor for one in held.corrupt.begins.states or () for tensor in (one.ssm, one.conv)]
    states = [tensor for tensor in pieces if tensor is not None]
    inner = [tensor for layer in held.corrupt.inner.values() for tensor in layer.values()]
    tensors = [*held.corrupt.sources, *inner, *held.base.sources, *states]
    floats = sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values()) / 2
    run = pairs.length - held.corrupt.begins.position
    estimated = len(pairs) * reference_bytes(model, graph, pairs.length)
    assert 0.6 * estimated * run / pairs.length < floats <= estimated
    assert len(inner) == (0 if not fine else model.n_layers * (4 if ssm == "conv" else 5))
