"""In half precision two ways to one number may round apart: which ways do not, and how far the others are."""

from __future__ import annotations

import pytest
import torch

from mamba_ioi import circuits, experiments, load_model
from mamba_ioi.interventions.patch import Patch
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.metrics import answer_probability
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset
from mamba_ioi.trace.sites import SITES

from .conftest import random_mamba

OTHER_SCAN = ("A_bar", "B_bar", "write", "h")  # where these are changed the scan is made of other operations
BOUND = 0.02  # of the largest logit


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest) -> MambaModel:
    sizes = {"hidden_size": 96, "state_size": 16, "vocab_size": 300, "time_step_rank": 6}
    return wrap(random_mamba(dtype=request.param, **sizes), None, model_id="random")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (6, 12), generator=torch.Generator().manual_seed(4))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, site in SITES.items() if site.owner != "model"])
def test_own_values_have_no_effect(half: MambaModel, ids: torch.Tensor, name: str) -> None:
    plain, columns = run(half, ids), torch.arange(300).expand(6, -1)
    last, none = torch.full((6,), 11), torch.zeros(6, dtype=torch.long)
    readout = Readout(tokens=columns, last=last, answers=none, corrupt_answers=none, candidates=columns)
    bound = BOUND * plain.abs().max() if name in OTHER_SCAN else 0
    for layer in range(3):
        value = cache(half, ids, [(name, layer)])[name, layer]
        assert (run(half, ids, [Patch(name, layer, value)]) - plain).abs().max() <= bound
        if SITES[name].by_position:
            changes = [[Patch(name, layer, value[:, [position]], position)] for position in (0, 5, 11)]
            swept = sweep(half, ids, [[], *changes], readout)
            assert torch.equal(swept[0], plain.to(swept))
            assert (swept - swept[0]).abs().max() <= bound


def test_one_path_in_a_trace_and_in_run(half: MambaModel, ids: torch.Tensor) -> None:
    plain = run(half, ids, positions="all")
    with torch.no_grad(), half.trace(ids):
        for layer in half.layers:
            layer.mixer.conv = layer.mixer.conv
            layer.mixer.y = layer.mixer.y
        same = half.logits.save()
    assert torch.equal(same, plain)
    assert torch.equal(cache(half, ids, ["logits"])["logits"], plain)
    with torch.no_grad():
        other = half._module(ids, use_cache=False).logits
    assert 0 < (other - plain).abs().max() < 0.1 * plain.abs().max()  # transformers' own scan rounds elsewhere

    value = torch.randn(6, 1, 192).to(half.dtype)
    with torch.no_grad(), half.trace(ids):
        for index, layer in enumerate(half.layers):
            layer.mixer.conv = layer.mixer.conv
            if index == 1:
                layer.mixer.ssm_input[:, 3:4] = value
            layer.mixer.y = layer.mixer.y
        patched = half.logits.save()
    assert torch.equal(patched, run(half, ids, [Patch("ssm_input", 1, value, 3)], positions="all"))


def test_experiments_compare_on_one_path() -> None:
    tiny = load_model("tiny", dtype=torch.bfloat16)
    data = IOIDataset.generate(tiny.tokenizer, 4, seed=5)
    logits = run(tiny, data.clean_tokens, positions=data.last_position)
    removed = experiments.layer_removal(tiny, data, progress=False).table.set_index("layer")
    expected = answer_probability(logits.float(), data.answers, data.candidates).double().mean()
    assert removed.probability[-1] == pytest.approx(float(expected), abs=1e-6)
    table = experiments.resample_ablation(tiny, data, progress=False).table
    assert (table.effect[table.position == 0] == 0).all()  # the prompts begin with the same token

    whole = circuits.Circuit.of(tiny, circuits.Graph(tiny.n_layers).edges())
    assert circuits.evaluate(tiny, data, whole).nld == 1
