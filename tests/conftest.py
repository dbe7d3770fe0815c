"""Fixtures that every test file may use."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import jaxtyping
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from mamba_ioi.models.model import MambaModel, wrap

from .conformance import Conformance

torch.set_num_threads(1)  # the tests' models are too small for more, and a busy machine makes threads wait
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", metavar="DIR", help="write there what each family is held to")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance(column, refused=False): holds a family to a column of the table")
    plugin = Conformance(config.getoption("--conformance"), config.getoption("--collect-only"))
    config.pluginmanager.register(plugin, "conformance")


@pytest.fixture(autouse=True)
def types(request: pytest.FixtureRequest) -> None:
    """Where types are checked at run time (`tests.typed`), check none where wrong ones are given on purpose.

    That is in tests marked `untyped`, and in those that expect a `ValueError`, which is what a caller without these
    checks sees.
    """
    if request.config.getoption("jaxtyping_packages", None):
        wrong = "pytest.raises(ValueError" in inspect.getsource(request.function)
        jaxtyping.config.update("jaxtyping_disable", wrong or request.node.get_closest_marker("untyped") is not None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the project's root; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"the reference data folder {folder} is absent")
    return folder


def random_mamba(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> MambaForCausalLM:
    """A small Mamba with random weights, none of them at a value that would hide a mistake."""
    sizes = {"vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 3} | sizes
    return randomized(MambaForCausalLM(MambaConfig(**sizes)), seed).to(dtype)


def random_mamba2(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> Mamba2ForCausalLM:
    """Likewise a Mamba-2: groups of heads, chunks shorter than the prompts, limits of the time step at both ends."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "state_size": 4,
        "num_heads": 6,
        "head_dim": 4,
        "n_groups": 2,
        "chunk_size": 3,
        "time_step_limit": (0.5, 2.0),
        "tie_word_embeddings": False,
    } | sizes
    return randomized(Mamba2ForCausalLM(Mamba2Config(**sizes)), seed).to(dtype)


RANDOM = {"mamba": random_mamba, "mamba2": random_mamba2}
"""A model of random weights, by family."""


def randomized(module: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with such weights."""
    module = module.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("D", "norm.weight", "norm_f.weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("A_log"):
                parameter.copy_(0.5 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return module


@pytest.fixture(scope="session")
def small() -> MambaModel:
    """A random three-layer Mamba without a tokenizer."""
    return wrap(random_mamba(), None, model_id="random")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Token ids [4, 9] for `small`."""
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(1))
