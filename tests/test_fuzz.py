"""Whatever the public functions are given, they answer or say in one sentence what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mamba_ioi
from mamba_ioi import IOIDataset, Patch, circuits, experiments
from mamba_ioi.models.model import MambaModel, wrap

from .conftest import random_mamba
from .plain import NAMES, prompt_tokenizer

TOKENIZER = prompt_tokenizer(NAMES)
MODEL: MambaModel = wrap(random_mamba(vocab_size=len(TOKENIZER), num_hidden_layers=2), TOKENIZER, model_id="random")
DATA = IOIDataset.generate(TOKENIZER, 1)
SCORES = circuits.eap(MODEL, DATA, steps=1)
CIRCUIT = circuits.top_k(SCORES, 2)

numbers = st.one_of(
    st.integers(-3, 25), st.floats(-2, 2), st.sampled_from([math.nan, math.inf, -math.inf, 10**12, -(10**12), 2**63])
)
anything = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.sampled_from(["h", "conv_slice", "layer_input", "resid_pre", "A", "logits", "standard", "paper", "attribution"]),
    st.lists(numbers, max_size=3),
    st.just(torch.tensor([1, 2])),
    st.just(torch.zeros(2, 0)),
    st.just({}),
    st.just(object()),
)


def few(value):
    """The value, or 1 where it asks for more work than a test has time for."""
    return 1 if isinstance(value, int | float) and 25 < value < math.inf else value


CALLS: dict[str, Callable] = {
    "run": lambda a, b, c, d: mamba_ioi.run(MODEL, DATA.clean_tokens, [Patch(a, b, c, d)]),
    "run a site": lambda a, b, c, d: mamba_ioi.run(MODEL, DATA.clean_tokens, [Patch("conv_slice", 1, a, b, c)]),
    "run at": lambda a, b, c, d: mamba_ioi.run(MODEL, DATA.clean_tokens, [Patch("h", a, 0.0, b)], positions=c),
    "run tokens": lambda a, b, c, d: mamba_ioi.run(MODEL, a, []),
    "cache": lambda a, b, c, d: mamba_ioi.cache(MODEL, DATA.clean_tokens, [a, (b, c)]),
    "cache a site": lambda a, b, c, d: mamba_ioi.cache(MODEL, DATA.clean_tokens, a),
    "generate": lambda a, b, c, d: IOIDataset.generate(TOKENIZER, few(a), seed=b, templates=c, corruptions=d),
    "resample_ablation": lambda a, b, c, d: experiments.resample_ablation(MODEL, DATA, a, b, c, progress=False),
    "resample a site": lambda a, b, c, d: experiments.resample_ablation(
        MODEL, DATA, "y", a, b, estimate=c, progress=False
    ),
    "cross_talk": lambda a, b, c, d: experiments.cross_talk(MODEL, DATA, a, progress=False),
    "state_similarity": lambda a, b, c, d: experiments.state_similarity(MODEL, a, b, progress=False),
    "eap": lambda a, b, c, d: circuits.eap(MODEL, DATA, variant=a, batch_rows=b),
    "eap steps": lambda a, b, c, d: circuits.eap(MODEL, DATA, steps=few(a)),
    "top_k": lambda a, b, c, d: circuits.top_k(SCORES, a, by=b, seed=c),
    "minimal_circuit": lambda a, b, c, d: circuits.minimal_circuit(MODEL, DATA, SCORES, a, by=b, seed=c),
    "acdc": lambda a, b, c, d: circuits.acdc(MODEL, DATA, CIRCUIT, a, batch_rows=b),
    "evaluate": lambda a, b, c, d: circuits.evaluate(MODEL, DATA, CIRCUIT, random_seed=a, batch_rows=b),
    "last_position_only": lambda a, b, c, d: circuits.last_position_only(MODEL, DATA, CIRCUIT, a),
    "data": lambda a, b, c, d: circuits.eap(MODEL, a, steps=1),
    "circuit": lambda a, b, c, d: circuits.evaluate(MODEL, DATA, a),
    "scores": lambda a, b, c, d: circuits.minimal_circuit(MODEL, DATA, a),
    "overlap": lambda a, b, c, d: circuits.overlap(CIRCUIT, a),
}


@pytest.mark.untyped
@pytest.mark.parametrize("name", CALLS)
def test_an_answer_or_one_sentence(name: str) -> None:
    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(anything, anything, anything, anything)
    def call(a, b, c, d) -> None:
        try:
            CALLS[name](a, b, c, d)
        except ValueError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 600

    call()
