"""The metrics against plain arithmetic, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from mamba_ioi.metrics import (
    accuracy,
    answer_probability,
    kl_divergence,
    logit_diff,
    normalized_logit_diff,
    vocabulary_probability,
)

VOCABULARY = 11
ANSWERS = torch.tensor([3, 0, 7, 10, 2, 5])
CORRUPT_ANSWERS = torch.tensor([4, 1, 2, 9, 0, 6])
CANDIDATES = torch.tensor([[3, 4, 8, -1], [1, 0, 5, 9], [2, 6, 7, -1], [9, 10, 0, 1], [0, 2, 1, -1], [6, 5, 10, 3]])


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def plain_nld(patched: list[float], clean: list[float], corrupt: list[float], a: int, b: int, absolute: bool) -> float:
    least, most = corrupt[a] - corrupt[b], clean[a] - clean[b]
    spread = abs(most - least) if absolute else most - least
    return (patched[a] - patched[b] - least) / (spread if spread != 0 else 1)


@pytest.mark.parametrize("absolute", [True, False])
def test_normalized_logit_diff_is_the_formula(absolute: bool) -> None:
    patched, clean, corrupt = (random_logits(seed).double() for seed in (1, 2, 3))
    found = normalized_logit_diff(patched, clean, corrupt, ANSWERS, CORRUPT_ANSWERS, absolute=absolute)
    for i, (a, b) in enumerate(zip(ANSWERS.tolist(), CORRUPT_ANSWERS.tolist(), strict=True)):
        expected = plain_nld(patched[i].tolist(), clean[i].tolist(), corrupt[i].tolist(), a, b, absolute)
        assert found[i].item() == pytest.approx(expected, rel=1e-12)
    spread = logit_diff(clean, ANSWERS, CORRUPT_ANSWERS) - logit_diff(corrupt, ANSWERS, CORRUPT_ANSWERS)
    assert (spread < 0).any() and (spread > 0).any(), "both signs of the range are met"


def test_the_ends_of_the_normalized_logit_diff() -> None:
    clean, corrupt = random_logits(2).double(), random_logits(3).double()
    rest = (clean, corrupt, ANSWERS, CORRUPT_ANSWERS)
    sign = (logit_diff(clean, *rest[2:]) - logit_diff(corrupt, *rest[2:])).sign()
    one = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(normalized_logit_diff(clean, *rest, absolute=False), one)
    torch.testing.assert_close(normalized_logit_diff(clean, *rest), sign)
    assert (normalized_logit_diff(corrupt, *rest) == 0).all()
    assert (normalized_logit_diff(corrupt, *rest, absolute=False) == 0).all()


def test_absolute_makes_a_better_answer_score_higher_in_every_row() -> None:
    clean, corrupt, patched = random_logits(2), random_logits(3), random_logits(4)
    better = patched.clone()
    better[torch.arange(6), ANSWERS] += 1
    rest = (clean, corrupt, ANSWERS, CORRUPT_ANSWERS)
    assert (normalized_logit_diff(better, *rest) > normalized_logit_diff(patched, *rest)).all()
    plain = normalized_logit_diff(better, *rest, absolute=False) > normalized_logit_diff(patched, *rest, absolute=False)
    assert plain.any() and not plain.all()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_range_of_zero_counts_as_one(absolute: bool) -> None:
    clean, patched = random_logits(5), random_logits(6)
    found = normalized_logit_diff(patched, clean, clean, ANSWERS, CORRUPT_ANSWERS, absolute=absolute)
    expected = logit_diff(patched, ANSWERS, CORRUPT_ANSWERS) - logit_diff(clean, ANSWERS, CORRUPT_ANSWERS)
    torch.testing.assert_close(found, expected)


def test_logit_diff() -> None:
    logits = random_logits(7)
    expected = [logits[i, a] - logits[i, b] for i, (a, b) in enumerate(zip(ANSWERS, CORRUPT_ANSWERS, strict=True))]
    assert torch.equal(logit_diff(logits, ANSWERS, CORRUPT_ANSWERS), torch.stack(expected))
    assert torch.equal(logit_diff(logits, ANSWERS, CORRUPT_ANSWERS), -logit_diff(logits, CORRUPT_ANSWERS, ANSWERS))


def test_accuracy_is_the_argmax_over_the_candidates() -> None:
    results = []
    for seed in range(20):
        logits = random_logits(seed)
        logits[:, -1] += 20  # what index -1 would read, were padding not ignored
        found = accuracy(logits, ANSWERS, CANDIDATES)
        for i in range(6):
            names = [name for name in CANDIDATES[i].tolist() if name >= 0]
            best = max(names, key=lambda name: logits[i, name].item())
            assert found[i].item() == float(best == ANSWERS[i].item())
        results += found.tolist()
    assert set(results) == {0.0, 1.0}


def test_padding_never_reads_token_0() -> None:
    logits = torch.full((1, 5), -9.0)
    logits[0, 0] = 100
    answers, candidates = torch.tensor([2]), torch.tensor([[2, 3, 4, -1]])
    logits[0, 2] = 1
    assert accuracy(logits, answers, candidates).item() == 1
    assert answer_probability(logits, answers, candidates).item() > 0.99


def test_a_tie_is_not_accurate() -> None:
    logits = torch.zeros(6, VOCABULARY)
    assert (accuracy(logits, ANSWERS, CANDIDATES) == 0).all()
    sizes = (CANDIDATES >= 0).sum(1)
    torch.testing.assert_close(answer_probability(logits, ANSWERS, CANDIDATES), 1 / sizes)


def test_an_answer_outside_the_candidates_joins_them() -> None:
    logits = random_logits(8)
    with_it = torch.tensor([[3, 8]])
    without_it = torch.tensor([[8, -1]])
    for metric in (accuracy, answer_probability):
        assert torch.equal(metric(logits[:1], ANSWERS[:1], with_it), metric(logits[:1], ANSWERS[:1], without_it))


def test_probabilities_are_softmaxes() -> None:
    logits = random_logits(9).double()
    among, full = answer_probability(logits, ANSWERS, CANDIDATES), vocabulary_probability(logits, ANSWERS)
    for i in range(6):
        weight = [math.exp(value) for value in logits[i].tolist()]
        names = [name for name in CANDIDATES[i].tolist() if name >= 0]
        mine = weight[ANSWERS[i]]
        assert among[i].item() == pytest.approx(mine / sum(weight[name] for name in names), rel=1e-12)
        assert full[i].item() == pytest.approx(mine / sum(weight), rel=1e-12)


def test_kl_divergence_is_from_clean_to_patched() -> None:
    patched, clean = random_logits(10).double(), random_logits(11).double()
    found = kl_divergence(patched, clean)
    for i in range(6):
        p = [math.exp(value) for value in clean[i].tolist()]
        q = [math.exp(value) for value in patched[i].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        assert found[i].item() == pytest.approx(expected, rel=1e-10)
    assert (kl_divergence(clean, clean) == 0).all()
    assert not torch.allclose(found, kl_divergence(clean, patched))
    masked, other = clean.clone(), patched.clone()
    masked[:, 0] = other[:, 0] = -torch.inf
    torch.testing.assert_close(kl_divergence(other, masked), kl_divergence(patched[:, 1:], clean[:, 1:]))


def test_nan_stays_nan() -> None:
    logits = random_logits(12)
    logits[0] = torch.nan
    logits[1, CANDIDATES[1, 3]] = torch.nan
    clean = random_logits(13)
    expected = [True, True, False, False, False, False]
    assert accuracy(logits, ANSWERS, CANDIDATES).isnan().tolist() == expected
    assert answer_probability(logits, ANSWERS, CANDIDATES).isnan().tolist() == expected
    assert kl_divergence(logits, clean).isnan().tolist() == expected
    assert kl_divergence(clean, logits).isnan().tolist() == expected
    assert vocabulary_probability(logits, ANSWERS).isnan().tolist() == expected
    found = normalized_logit_diff(logits, clean, clean, ANSWERS, CORRUPT_ANSWERS)
    assert found.isnan().tolist() == [True] + [False] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, clean, corrupt = (random_logits(seed).to(dtype) for seed in (14, 15, 16))
    for metric, arguments in (
        (logit_diff, (ANSWERS, CORRUPT_ANSWERS)),
        (accuracy, (ANSWERS, CANDIDATES)),
        (answer_probability, (ANSWERS, CANDIDATES)),
        (vocabulary_probability, (ANSWERS,)),
    ):
        found = metric(logits, *arguments)
        assert found.dtype == torch.float32 and torch.equal(found, metric(logits.float(), *arguments))
    rest = (ANSWERS.int(), CORRUPT_ANSWERS.int())
    found = normalized_logit_diff(logits, clean, corrupt, *rest)
    assert torch.equal(found, normalized_logit_diff(logits.float(), clean.float(), corrupt.float(), *rest))


def test_gradients() -> None:
    logits = random_logits(17).double().requires_grad_()
    clean, corrupt = random_logits(18).double(), random_logits(19).double()
    for metric in (
        lambda x: logit_diff(x, ANSWERS, CORRUPT_ANSWERS),
        lambda x: normalized_logit_diff(x, clean, corrupt, ANSWERS, CORRUPT_ANSWERS),
        lambda x: answer_probability(x, ANSWERS, CANDIDATES),
        lambda x: vocabulary_probability(x, ANSWERS),
        lambda x: kl_divergence(x, clean),
    ):
        assert torch.autograd.gradcheck(metric, (logits,))


@pytest.mark.untyped
def test_lists_are_token_ids_too() -> None:
    logits = random_logits(20)
    found = accuracy(logits, ANSWERS.tolist(), CANDIDATES.numpy())
    assert torch.equal(found, accuracy(logits, ANSWERS, CANDIDATES))
    assert torch.equal(logit_diff(logits, ANSWERS.numpy(), ANSWERS.tolist()), torch.zeros(6))


def test_bad_input() -> None:
    logits = random_logits(20)
    short = logits[:5]
    for call, message in (
        (lambda: logit_diff(logits[:, None], ANSWERS, ANSWERS), r"logits must be \[B, V\] .* \(6, 1, 11\)"),
        (lambda: logit_diff(short, ANSWERS, ANSWERS), r"answers \[B\], not \(5, 11\) and \(6,\)"),
        (lambda: logit_diff(logits, ANSWERS, ANSWERS[:5]), r"corrupt_answers \[B\]"),
        (lambda: logit_diff(logits, ANSWERS + 1, ANSWERS), "answers holds token 11, outside .* of 11"),
        (lambda: logit_diff(logits, ANSWERS - 1, ANSWERS), "answers holds token -1"),
        (lambda: logit_diff(logits, [[1], [2, 3]], ANSWERS), r"answers must be token ids .* not \[\[1\], \[2, 3\]\]"),
        (lambda: logit_diff(logits, None, ANSWERS), "answers must be token ids .* not None"),
        (lambda: logit_diff(logits.long(), ANSWERS, ANSWERS), "logits must be a tensor of floats, not torch.int64"),
        (lambda: kl_divergence(logits.tolist(), logits), "logits must be a tensor of floats, not list"),
        (lambda: logit_diff(logits, ANSWERS.where(ANSWERS[4] != ANSWERS, 99), ANSWERS), "of answers holds token 99"),
        (lambda: logit_diff(logits, ANSWERS.float(), ANSWERS), "integer type, not torch.float32"),
        (lambda: accuracy(logits, ANSWERS, CANDIDATES[:5]), r"candidates must be \[6, K\].*\(5, 4\)"),
        (lambda: accuracy(logits, ANSWERS, CANDIDATES[:, 0]), r"candidates must be \[6, K\]"),
        (lambda: accuracy(logits, ANSWERS, CANDIDATES[:, :0]), "K > 0"),
        (lambda: answer_probability(logits, ANSWERS, CANDIDATES + 1), "candidates holds token 11"),
        (lambda: normalized_logit_diff(short, logits, logits, ANSWERS, ANSWERS), "must have one shape"),
        (lambda: kl_divergence(logits, short), "must have one shape"),
        (lambda: kl_divergence(logits[0], logits[0]), r"one shape \[B, V\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
