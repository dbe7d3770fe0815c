"""The public names: those of the contract exist, with these parameters."""

from __future__ import annotations

import inspect

import pytest

import mamba_ioi
from mamba_ioi import circuits, experiments, metrics

SIGNATURES = {
    mamba_ioi.load_model: "name *device *dtype *revision *remote",
    mamba_ioi.planted: "n_layers layer slice n_names seed",
    mamba_ioi.cache: "model tokens sites",
    mamba_ioi.run: "model tokens patches *positions",
    mamba_ioi.activations: "model tokens_or_pairs site layer *positions *batch_rows",
    mamba_ioi.cache_to: "folder model tokens_or_pairs sites *positions *batch_rows",
    mamba_ioi.Splice: "sae keep_error features value",
    mamba_ioi.Patch: "site layer value positions slice",
    mamba_ioi.IOIDataset.generate: "tokenizer n_pairs *seed *templates *corruptions *symmetric",
    mamba_ioi.bottleneck: "model data",
    metrics.normalized_logit_diff: "patched clean corrupt answers corrupt_answers *absolute",
    metrics.logit_diff: "logits answers corrupt_answers",
    metrics.accuracy: "logits answers candidates",
    metrics.answer_probability: "logits answers candidates",
    experiments.resample_ablation: "model data site layers positions",
    experiments.feature_effects: "model pairs sae site layer",
    experiments.probe: "model pairs site layers target",
    experiments.layer_removal: "model data",
    experiments.greedy_layer_removal: "model data",
    experiments.cross_talk: "model data target",
    experiments.state_similarity: "model prompts layer",
    experiments.conv_slices: "model data layer slices",
    experiments.name_steering: "model layer n_pairs n_test seed",
    circuits.eap: "model data *steps *positional *variant *fine",
    circuits.minimal_circuit: "model data scores",
    circuits.acdc: "model data circuit",
    circuits.evaluate: "model data circuit",
    circuits.faithfulness: "model data scores",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_the_contracts_parameters(function):
    parameters = inspect.signature(function).parameters
    for position, name in enumerate(SIGNATURES[function].split()):
        keyword_only = name.startswith("*")
        assert name.lstrip("*") in parameters
        parameter = parameters[name.lstrip("*")]
        if keyword_only:
            assert parameter.kind is parameter.KEYWORD_ONLY
        else:
            assert list(parameters)[position] == name
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def test_every_public_name_is_there():
    for name in mamba_ioi.__all__:
        assert getattr(mamba_ioi, name) is not None
        assert name in dir(mamba_ioi)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = mamba_ioi.nothing_of_the_kind


def test_results_and_circuits_have_what_the_contract_says():
    for attribute in ("table", "meta", "save", "load", "plot"):
        assert hasattr(mamba_ioi.Result, attribute) or attribute in mamba_ioi.Result.__dataclass_fields__
    for attribute in ("edges", "accuracy", "nld", "save", "load"):
        assert hasattr(circuits.Circuit, attribute) or attribute in circuits.Circuit.__dataclass_fields__
