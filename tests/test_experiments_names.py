"""Means of names, steering and principal components against plain computations, one prompt at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mamba_ioi.experiments import name_means, name_pca, name_steering
from mamba_ioi.experiments.name_steering import test_rows
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset, single_token_names

from . import plain
from .conftest import RANDOM
from .plain import NAMES

LAYER, PAIRS, SEED = 1, 48, 3


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    tokenizer = plain.prompt_tokenizer(NAMES)
    return wrap(RANDOM[request.param](seed=8, vocab_size=len(tokenizer)), tokenizer, model_id="random")


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


def prompts_by_hand(model: MambaModel, n_pairs: int) -> list[SimpleNamespace]:
    """Every prompt of the means' pairs: the clean ones, then the corrupt ones; `other` is the pair's other answer."""
    data = IOIDataset.generate(model.tokenizer, n_pairs, seed=SEED, templates="all", symmetric=False)
    sides = ((data.clean_tokens, data.answers), (data.corrupt_tokens, data.corrupt_answers))
    prompts = []
    for (tokens, answers), (_, others) in (sides, sides[::-1]):
        for row in range(n_pairs):
            ids, at = tokens[row, : data.last_position[row] + 1], data.name_positions[row]
            prompts.append(SimpleNamespace(ids=ids[None], names=ids[at], at=at, answer=answers[row], other=others[row]))
    return prompts


def steer_by_hand(model: MambaModel, n_pairs: int, n_test: int) -> dict[tuple[str, int, int], list[bool]]:
    """(method, source, target) -> which of the test prompts succeed, those without means left out."""
    means = {key: values.mean(0) for key, values in means_by_hand(model, 1, n_pairs).items()}
    prompts = prompts_by_hand(model, n_pairs)
    drawn = test_rows(IOIDataset.generate(model.tokenizer, n_pairs, seed=SEED, templates="all"), n_test, SEED)

    def word(token: Tensor) -> str:
        return model.tokenizer.decode([int(token)]).strip()

    found = defaultdict(list)
    for target, one in ((slot, prompts[row]) for slot, rows in drawn.items() for row in rows):
        old = one.names[target - 1]
        assert target > 3 or old == one.answer
        new, winner = (one.other, one.other) if target <= 3 else (one.answer, old)
        at = one.at[target - 1] + 1
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
                    logits = model._module(one.ids, use_cache=False).logits[0, -1]
                found[method, source, target].append(bool(logits[winner] > logits[one.answer]))
    return found


def test_test_prompts_are_of_both_directions_and_drawn_again_and_again(model: MambaModel) -> None:
    """By the corruptions, the new name stands in the prompt in a third, a half, a third of those for slots 1, 2, 3.

    The authors' draw had .35, .52 and .31 of theirs.
    """
    n_pairs, n = 400, 6000
    pool = IOIDataset.generate(model.tokenizer, n_pairs, seed=5, templates="all")
    drawn = test_rows(pool, n, 5)
    for target, share in ((1, 1 / 3), (2, 1 / 2), (3, 1 / 3)):
        rows = torch.tensor(drawn[target])
        assert (pool.clean_names[rows, target - 1] == pool.answers[rows]).all()
        fits = (pool.clean_names[:, target - 1] == pool.answers).nonzero()[:, 0].tolist()
        assert set(rows.tolist()) == set(fits), "every prompt that fits is drawn, and more than once"
        there = (pool.clean_names[rows] == pool.corrupt_answers[rows, None]).any(1).float().mean()
        assert there == pytest.approx(share, abs=0.06)
    for target in (4, 5):
        swapped = (torch.tensor(drawn[target]) >= n_pairs).float().mean()
        assert swapped == pytest.approx(0.5, abs=0.03) and len(drawn[target]) == n > len(set(drawn[target]))
    assert test_rows(pool, 7, 5)[1] == test_rows(pool, 9, 5)[1][:7] != test_rows(pool, 7, 6)[1]
    alone = pool[[row for row in range(len(pool)) if pool.clean_names[row, 0] != pool.answers[row]]]
    assert test_rows(alone, 7, 5)[1] == [] and len(test_rows(alone, 7, 5)[2]) == 7


@pytest.mark.parametrize(("n_pairs", "n_test"), [(PAIRS, 5), (4, 4)])
def test_steering_equals_one_prompt_at_a_time(model: MambaModel, n_pairs: int, n_test: int) -> None:
    result = name_steering(model, LAYER, n_pairs, n_test, SEED, progress=False)
    expected = steer_by_hand(model, n_pairs, n_test)
    assert len(result.table) == 2 * 5 * 5 and (result.table["n"] <= n_test).all()
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
    pool = IOIDataset.generate(model.tokenizer, PAIRS, seed=SEED, templates="all")
    for target, rows in test_rows(pool, 10, SEED).items():
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
    bare = wrap(RANDOM["mamba"](vocab_size=len(model.tokenizer)), None, model_id="bare")
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
