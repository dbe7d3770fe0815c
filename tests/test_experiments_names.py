"""Means of names, steering and principal components against plain computations, one prompt at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mamba_ioi.dataset import IOIDataset, single_token_names
from mamba_ioi.experiments import name_means, name_pca, name_steering
from mamba_ioi.model import MambaModel, wrap

from . import plain
from .conftest import random_mamba
from .plain import NAMES

LAYER, PAIRS, SEED = 1, 48, 3


@pytest.fixture(scope="module")
def model() -> MambaModel:
    tokenizer = plain.prompt_tokenizer(NAMES)
    return wrap(random_mamba(seed=8, vocab_size=len(tokenizer)), tokenizer, model_id="random")


def means_by_hand(model: MambaModel, offset: int, n_pairs: int = PAIRS) -> dict[tuple[str, int], Tensor]:
    """(name, slot) -> every value, [count, E]."""
    found = defaultdict(list)
    data = IOIDataset.generate(model.tokenizer, n_pairs, seed=SEED, templates="all", symmetric=False)
    for prompts, texts in ((data.clean_tokens, data.clean_text), (data.corrupt_tokens, data.corrupt_text)):
        for row, text in enumerate(texts):
            ids = model.tokenizer("<|endoftext|>" + text, return_tensors="pt")["input_ids"]
            assert ids[0].tolist() == prompts[row, : ids.shape[1]].tolist()
            values = plain.values(model._module, ids, "ssm_input", LAYER)[0]
            slot = 0
            for position, token in enumerate(ids[0].tolist()):
                name = model.tokenizer.decode([token]).strip()
                if name in NAMES:
                    slot += 1
                    found[name, slot].append(values[position + offset])
            assert slot == 5
    return {key: torch.stack(values) for key, values in found.items()}


@pytest.mark.parametrize("offset", [0, 2])
def test_means_equal_one_prompt_at_a_time(model: MambaModel, offset: int) -> None:
    means = name_means(model, LAYER, PAIRS, seed=SEED, offset=offset, progress=False)
    expected = means_by_hand(model, offset)
    assert sorted(means.names) == sorted(single_token_names(model.tokenizer)) == sorted(NAMES)
    assert means.means.dtype == torch.float32 and means.means.shape == (len(NAMES), 5, model.d_inner)
    assert means.counts.sum() == 2 * PAIRS * 5
    for i, name in enumerate(means.names):
        for slot in range(1, 6):
            values = expected.get((name, slot), torch.zeros(0, model.d_inner))
            assert means.counts[i, slot - 1] == len(values)
            if len(values):
                torch.testing.assert_close(means.means[i, slot - 1], values.mean(0), atol=1e-5, rtol=1e-4)


def steer_by_hand(model: MambaModel, n_pairs: int, n_test: int) -> dict[tuple[str, int, int], list[bool]]:
    """(method, source, target) -> which of the test prompts succeed, those without means left out."""
    means = {key: values.mean(0) for key, values in means_by_hand(model, 1, n_pairs).items()}
    pool = IOIDataset.generate(model.tokenizer, 20 * n_test, seed=SEED + 1, templates="all", symmetric=False)

    def word(token: int) -> str:
        return model.tokenizer.decode([int(token)]).strip()

    found = defaultdict(list)
    for target in range(1, 6):
        tested = 0
        for row in range(len(pool)):
            one = pool[row]
            old, answer, other = one.clean_names[0, target - 1], one.answers[0], one.corrupt_answers[0]
            if tested == n_test or (target <= 3 and old != answer):
                continue
            tested += 1
            new, winner = (other, other) if target <= 3 else (answer, old)
            at = one.name_positions[0, target - 1] + 1
            for method in ("replace", "subtract_add"):
                for source in range(1, 6):
                    needed = [(word(new), source)] + ([(word(old), source)] if method == "subtract_add" else [])
                    if any(key not in means for key in needed):
                        continue

                    def write(value: Tensor, method=method, needed=needed, at=at) -> Tensor:
                        value = value.clone()
                        if method == "replace":
                            value[:, at] = means[needed[0]]
                        else:
                            value[:, at] += means[needed[0]] - means[needed[1]]
                        return value

                    with plain.edited(model._module, {("ssm_input", LAYER): write}), torch.no_grad():
                        tokens = one.clean_tokens[:, : one.last_position[0] + 1]
                        logits = model._module(tokens, use_cache=False).logits[0, -1]
                    found[method, source, target].append(bool(logits[winner] > logits[answer]))
        assert tested == n_test
    return found


@pytest.mark.parametrize(("n_pairs", "n_test"), [(PAIRS, 5), (4, 4)])
def test_steering_equals_one_prompt_at_a_time(model: MambaModel, n_pairs: int, n_test: int) -> None:
    result = name_steering(model, LAYER, n_pairs, n_test, SEED, progress=False)
    expected = steer_by_hand(model, n_pairs, n_test)
    assert len(result.table) == 2 * 5 * 5
    for row in result.table.itertuples():
        outcomes = expected[row.method, row.source_slot, row.target_slot]
        assert row.n == len(outcomes)
        if outcomes:
            assert row.success == pytest.approx(np.mean(outcomes)) and row.low <= row.success <= row.high
        else:
            assert np.isnan(row.success)
    if n_pairs == PAIRS:
        assert set(result.table["n"]) == {n_test}
        assert 0 < result.table["success"].mean() < 1
    else:
        assert result.table["n"].min() < n_test, "so few pairs leave names without means"
    assert result.meta["arguments"] == {"layer": LAYER, "n_pairs": n_pairs, "n_test": n_test, "offset": 1}
    assert result.meta["seed"] == SEED


def test_adding_no_difference_changes_nothing(model: MambaModel) -> None:
    means = name_means(model, LAYER, PAIRS, seed=SEED, progress=False)
    same = replace(means, means=means.means[:1].expand_as(means.means))
    table = name_steering(model, means=same, n_test=10, progress=False).table
    added = table[table["method"] == "subtract_add"]
    pool = IOIDataset.generate(model.tokenizer, 200, seed=SEED + 1, templates="all", symmetric=False)
    for target in range(1, 6):
        rows = [r for r in range(200) if target > 3 or pool.clean_names[r, target - 1] == pool.answers[r]][:10]
        data = pool[rows]
        logits = plain.last_logits(model._module, data.clean_tokens, data.last_position)
        winners = data.corrupt_answers if target <= 3 else data.clean_names[:, target - 1]
        wins = logits.gather(1, winners[:, None]) > logits.gather(1, data.answers[:, None])
        assert added[added["target_slot"] == target]["success"].tolist() == pytest.approx(
            [wins.float().mean().item()] * 5
        )


def test_pca_equals_the_covariance_s_eigenvectors(model: MambaModel) -> None:
    means = name_means(model, LAYER, PAIRS, seed=SEED, progress=False)
    result = name_pca(model, means=means, progress=False)
    table = result.table
    index = [(means.names.index(row.name), row.slot - 1) for row in table.itertuples(index=False)]
    points = np.stack([means.means[i, s].double().numpy() for i, s in index])
    points = points - points.mean(0)
    variances, vectors = np.linalg.eigh(points.T @ points)
    for column, k in (("pc1", -1), ("pc2", -2)):
        along = points @ vectors[:, k]
        assert np.abs(along @ table[column]) == pytest.approx(np.linalg.norm(along) * np.linalg.norm(table[column]))
        assert np.linalg.norm(along) == pytest.approx(np.linalg.norm(table[column]), rel=1e-4)
    assert result.meta["explained_variance"] == pytest.approx(list(variances[[-1, -2]] / variances.sum()), rel=1e-4)
    assert (table["n"] > 0).all() and len(table) == int((means.counts > 0).sum())


def test_bad_arguments(model: MambaModel) -> None:
    bare = wrap(random_mamba(vocab_size=len(model.tokenizer)), None, model_id="bare")
    for call, message in (
        (lambda: name_means(model, 3, 2), "layers are whole numbers from 0 to 2"),
        (lambda: name_means(model, 1, 0), "n_pairs"),
        (lambda: name_means(model, 1, 2, offset=4), "offset is a whole number from 0 to 3"),
        (lambda: name_means(model, 1, 2, offset=-1), "offset"),
        (lambda: name_steering(bare, 1, 2), "no tokenizer"),
        (lambda: name_steering(model, 1, 2, n_test=0), "n_test must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    means = name_means(model, LAYER, 2, progress=False)
    with pytest.raises(ValueError, match="no test prompt has names with means"):
        name_steering(model, means=replace(means, counts=torch.zeros_like(means.counts)), n_test=2, progress=False)
