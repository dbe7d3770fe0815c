"""The metrics of pairs, of sets of answers too: by arithmetic, in experiments, in exact effects and in attributions."""

from __future__ import annotations

import pytest
import torch

from mamba_ioi import IOIDataset, PromptPairs, circuits, experiments, metrics
from mamba_ioi.interventions.run import cache
from mamba_ioi.models.model import MambaModel, wrap

from . import plain
from .conftest import random_mamba
from .plain import NAMES

NAMED = ["nld", "logit_diff", "prob_diff", "margin"]


@pytest.fixture(scope="module")
def model() -> MambaModel:
    tokenizer = plain.prompt_tokenizer(NAMES)
    return wrap(random_mamba(seed=3, vocab_size=len(tokenizer)), tokenizer, model_id="random")


@pytest.fixture(scope="module")
def pairs(model) -> PromptPairs:
    """Pairs whose answers are sets of one or two tokens, with prompts of two lengths."""
    data = IOIDataset.generate(model.tokenizer, 5, seed=5, templates="all")
    more = torch.tensor([3 if row % 2 else -1 for row in range(len(data))])
    wrong = torch.tensor([4 if row % 3 else -1 for row in range(len(data))])
    return PromptPairs(
        clean_tokens=data.clean_tokens,
        corrupt_tokens=data.corrupt_tokens,
        last_position=data.last_position,
        answers=torch.stack([data.answers, more], 1),
        corrupt_answers=torch.stack([wrong, data.corrupt_answers], 1),
        marks={"n4": data.marks["n4"]},
    )


def by_hand(metric: str, logits: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
    found = []
    for row, right, wrong, candidates in zip(
        logits.double(), *(ids.tolist() for ids in (*pairs.answer_sets, pairs.candidates)), strict=True
    ):
        right, wrong = [t for t in right if t >= 0], [t for t in wrong if t >= 0]
        others = [t for t in candidates if t >= 0 and t not in right]
        chances = row.softmax(0)
        mean = sum(row[t] for t in right) / len(right)
        found.append(
            {
                "prob_diff": sum(chances[t] for t in right) - sum(chances[t] for t in wrong),
                "margin": mean - max(row[t] for t in others),
            }.get(metric, mean - sum(row[t] for t in wrong) / len(wrong))
        )
    return torch.stack([torch.as_tensor(value) for value in found])


def custom(logits: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
    """Cubes of a logit: not linear in the logits, and not among the candidates."""
    return logits[:, 7] ** 3 + logits.gather(1, pairs.answers[:, :1].to(logits.device))[:, 0]


def custom_by_hand(logits: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
    return torch.stack(
        [row[7] ** 3 + row[int(ids[0])] for row, ids in zip(logits, pairs.answers, strict=True)]
    ).double()


def test_metrics_of_sets_by_arithmetic(pairs) -> None:
    logits = torch.randn(len(pairs), 60, generator=torch.Generator().manual_seed(1))
    ids = pairs.answers, pairs.corrupt_answers, pairs.candidates
    for metric in NAMED:
        found = metrics.measure(metric, logits, *ids)
        torch.testing.assert_close(found.double(), by_hand(metric, logits, pairs), rtol=1e-5, atol=1e-6)
    right = metrics.accuracy(logits, pairs.answers, pairs.candidates)
    chance = metrics.answer_probability(logits, pairs.answers, pairs.candidates)
    for row, answers, candidates, one, p in zip(logits, pairs.answers, pairs.candidates, right, chance, strict=True):
        known = candidates[candidates >= 0]
        best = int(known[row[known].argmax()])
        assert bool(one) == (best in answers.tolist())
        inside = torch.tensor([token in answers.tolist() for token in known.tolist()])
        assert float(p) == pytest.approx(float(row[known].softmax(0)[inside].sum()), abs=1e-6)
    assert 0 < right.mean() < 1


def plainly(model, pairs, metric, site, layer, position):
    """Each row's effect by hooks: the run patched with the corrupt run's value at the row's own position."""
    score = custom_by_hand if metric is custom else lambda logits, one: by_hand(metric, logits, one)
    effects = []
    for i in range(len(pairs)):
        one = pairs[i]
        patched = score(plain.resampled(model._module, one, site, layer, int(position[i])), one)
        clean, corrupt = (
            score(plain.last_logits(model._module, tokens, one.last_position), one)
            for tokens in (one.clean_tokens, one.corrupt_tokens)
        )
        effects.append((1 - (patched - corrupt) / (clean - corrupt) if metric == "nld" else clean - patched).item())
    return torch.tensor(effects)


@pytest.mark.parametrize("metric", [*NAMED, custom])
def test_resample_ablation_under_each_metric(model, pairs, metric) -> None:
    found = experiments.resample_ablation(model, pairs, "h", [1], marks=["n4", "last"], metric=metric, progress=False)
    for mark, effect in zip(found.table["mark"], found.table["effect"], strict=True):
        expected = plainly(model, pairs, metric, "h", 1, pairs.positions_of(mark))
        assert effect == pytest.approx(expected.mean().item(), rel=2e-3, abs=1e-5)
    assert found.table["effect"].abs().max() > 1e-4
    assert found.meta["arguments"]["metric"] == (metric if isinstance(metric, str) else "custom")
    assert any(("1 − NLD" if metric == "nld" else "loss of") in axes.get_ylabel() for axes in found.plot().axes)
    own = PromptPairs(
        **{name: getattr(pairs, name) for name in ("clean_tokens", "corrupt_tokens", "answers", "corrupt_answers")},
        last_position=pairs.last_position,
        metric=metric,
    )
    assert experiments.bottleneck(model, own) == experiments.bottleneck(model, pairs, metric=metric)


@pytest.mark.parametrize("metric", [*NAMED, custom])
def test_exact_effects_and_attributions_under_each_metric(model, pairs, metric) -> None:
    """The last edge by the weights; attributions out of embed sum to the metric's whole change, at many steps."""
    score = custom_by_hand if metric is custom else lambda logits, one: by_hand(metric, logits, one)
    module, last = model._module, model.n_layers - 1
    rows, ends = torch.arange(len(pairs)), pairs.last_position
    keys = ("resid_post", last), ("out_proj", last)
    (resid, here), (_, there) = (
        [cache(model, tokens, keys)[key][rows, ends] for key in keys]
        for tokens in (pairs.clean_tokens, pairs.corrupt_tokens)
    )
    clean, corrupt = (
        score(plain.last_logits(module, tokens, ends), pairs) for tokens in (pairs.clean_tokens, pairs.corrupt_tokens)
    )
    with torch.no_grad():
        changed = score(module.lm_head(module.backbone.norm_f(resid - here + there)), pairs)
    spread = (clean - corrupt) if metric == "nld" else torch.ones_like(clean)
    exact = circuits.exact_effects(model, pairs, metric=metric, absolute=False)
    edge = exact.table[(exact.table.src == str(last)) & (exact.table.dst == "output")].score.item()
    assert edge == pytest.approx(((changed - clean) / spread).mean().item(), rel=2e-3, abs=1e-5)
    scores = circuits.eap(model, pairs, metric=metric, steps=60, absolute=False)
    out_of_embed = scores.table[scores.table.src == "embed"].score.sum()
    assert out_of_embed == pytest.approx(((corrupt - clean) / spread).mean().item(), rel=0.05, abs=1e-4)
    for result in (exact, scores):
        assert result.meta["arguments"]["metric"] == (metric if isinstance(metric, str) else "custom")
    whole = circuits.Circuit.of(model, circuits.Graph(model.n_layers).edges())
    judged = circuits.evaluate(model, pairs, whole, metric=metric, absolute=False)
    assert judged.score == pytest.approx(1 if metric == "nld" else clean.mean().item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("metric", NAMED)
def test_estimates_under_each_metric_are_slopes(model, pairs, metric) -> None:
    """At the output of the last layer, where a small step's change is the derivative times the step."""
    found = experiments.resample_ablation(
        model, pairs, "resid_post", [2], marks=["last"], metric=metric, estimate="attribution", progress=False
    )
    module, rows, ends = model._module.double(), torch.arange(len(pairs)), pairs.last_position
    try:
        here, there = (
            cache(model, tokens, [("resid_post", 2)])["resid_post", 2][rows, ends].double()
            for tokens in (pairs.clean_tokens, pairs.corrupt_tokens)
        )
        weight, head = module.backbone.norm_f.weight.detach(), module.lm_head.weight.detach()

        def value(stream):
            normal = weight * stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-5)
            return by_hand(metric, normal @ head.T, pairs)

        step = 1e-4
        slope = (value(here + step * (there - here)) - value(here - step * (there - here))) / (2 * step)
        expected = -slope / (value(here) - value(there)) if metric == "nld" else -slope
    finally:
        model._module.float()
    assert found.table["effect"].item() == pytest.approx(expected.mean().item(), rel=5e-3, abs=1e-5)


def test_metrics_that_do_not_fit(model, pairs) -> None:
    run = experiments.resample_ablation
    given = {"layers": [1], "marks": ["last"], "progress": False}
    with pytest.raises(
        ValueError, match="metric is one of nld, logit_diff, prob_diff, margin, or a callable, not 'kl'"
    ):
        run(model, pairs, **given, metric="kl")
    with pytest.raises(ValueError, match=r"must return a tensor with a number a row, \[10\], not shape \(\)"):
        run(model, pairs, **given, metric=lambda logits, rows: logits.sum())
    with pytest.raises(ValueError, match="not float"):
        circuits.exact_effects(model, pairs, metric=lambda logits, rows: 0.0)
    with pytest.raises(ValueError, match="estimates are of metrics by name"):
        run(model, pairs, **given, metric=custom, estimate="attribution")
