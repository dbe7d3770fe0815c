"""What a run's logits say about the task: pure, differentiable functions of last-position logits.

Logits are [B, V], one row a prompt at its own last position; results are [B]. Half-precision logits are read
as float32. A row with NaN among the logits it needs gives NaN, never a number. Token ids may lie on another
device than the logits. Answers are [B], or sets [B, A] padded with -1: their logit is the mean over the set.
Definitions: the paper, Section 3 and Appendix B (arXiv 2407.14008).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def logit_diff(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B *A"], corrupt_answers: Int[Tensor, "B *A2"]
) -> Float[Tensor, "B"]:
    """Logit of the answer less the logit of the corrupt prompt's answer.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    return _logit(logits, answers, "answers") - _logit(logits, corrupt_answers, "corrupt_answers")


def normalized_logit_diff(
    patched: Float[Tensor, "B V"],
    clean: Float[Tensor, "B V"],
    corrupt: Float[Tensor, "B V"],
    answers: Int[Tensor, "B *A"],
    corrupt_answers: Int[Tensor, "B *A2"],
    *,
    absolute: bool = True,
) -> Float[Tensor, "B"]:
    """Where the patched run's logit difference lies between the corrupt run's (0) and the clean run's (1).

    With `min` the corrupt run's and `max` the clean run's `logit_diff`, it is `(patched - min) / range`, and
    `range` is 1 where `max == min` (paper, Appendix B). It may lie outside [0, 1].

    Args:
        patched: Logits of the run with an intervention.
        clean: Logits of the clean prompt without intervention.
        corrupt: Logits of the corrupt prompt without intervention.
        answers: Answers of the clean prompts.
        corrupt_answers: Answers of the corrupt prompts.
        absolute: True takes `range = |max - min|`, as Appendix B does so that higher is always better. A row
            whose clean run favours the corrupt answer more than its corrupt run does (`max < min`) then has
            its sign reversed: its clean run itself scores -1. False takes `range = max - min`: the clean run
            scores 1 and the corrupt run 0 in every row, as in the heat maps of Figures 4, 8, 10 and 11.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    if not _check_logits(patched).shape == _check_logits(clean).shape == _check_logits(corrupt).shape:
        raise ValueError(
            "patched, clean and corrupt logits must have one shape, "
            f"not {tuple(patched.shape)}, {tuple(clean.shape)} and {tuple(corrupt.shape)}"
        )
    values = (logit_diff(logits, answers, corrupt_answers) for logits in (patched, clean, corrupt))
    return normalized(*values, absolute=absolute)


def normalized(
    patched: Float[Tensor, "..."], clean: Float[Tensor, "..."], corrupt: Float[Tensor, "..."], *, absolute: bool
) -> Float[Tensor, "..."]:
    """Where a value lies between the corrupt run's (0) and the clean run's (1), as `normalized_logit_diff` has it."""
    least, spread = scale(clean, corrupt, absolute=absolute)
    return (patched - least) / spread


def scale(
    clean: Float[Tensor, "B"], corrupt: Float[Tensor, "B"], *, absolute: bool
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """The ``min`` and ``range`` of two runs' values: what is normalized is (value - min) / range."""
    spread = clean - corrupt
    spread = spread.abs() if absolute else spread
    return corrupt, torch.where(spread == 0, torch.ones_like(spread), spread)


def prob_diff(
    logits: Float[Tensor, "B V"],
    answers: Int[Tensor, "B *A"],
    corrupt_answers: Int[Tensor, "B *A2"],
    total: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B"]:
    """Probability of the answers less that of the corrupt answers, by the softmax over the full vocabulary.

    Args:
        logits: Logits at the last position.
        answers: The right answers; of a set, probabilities are summed.
        corrupt_answers: The same of the corrupt prompt.
        total: Log of the sum of the exponentials of all tokens' logits, where ``logits`` are some tokens' alone.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    total = _at_least_float32(_check_logits(logits)).logsumexp(dim=1) if total is None else total
    one, other = (
        (_set_logits(logits, ids, name) - total[:, None]).exp().sum(1)
        for ids, name in ((answers, "answers"), (corrupt_answers, "corrupt_answers"))
    )
    return one - other


def margin(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B *A"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """Logit of the answer less that of the best candidate that is no answer.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    best = _other_logits(logits, answers, candidates).max(dim=1).values
    return _logit(logits, answers, "answers") - best


def measure(
    metric: str,
    logits: Float[Tensor, "B V"],
    answers: Int[Tensor, "B *A"],
    corrupt_answers: Int[Tensor, "B *A2"],
    candidates: Int[Tensor, "B K"],
    total: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "B"]:
    """A metric of pairs by its name, of one run; of ``nld``, which needs three runs, the logit difference."""
    if metric == "prob_diff":
        return prob_diff(logits, answers, corrupt_answers, total)
    if metric == "margin":
        return margin(logits, answers, candidates)
    return logit_diff(logits, answers, corrupt_answers)


def accuracy(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B *A"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """1 where the answer's logit is above that of every other candidate, else 0; a tie counts as wrong.

    Of a set, 1 where the best candidate is in the set.

    Args:
        logits: Logits at the last position.
        answers: The right names.
        candidates: The names of each pair; negative entries are padding. The answer counts as one of them.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    answer, others = _set_logits(logits, answers, "answers"), _other_logits(logits, answers, candidates)
    answer, best = answer.max(dim=1).values, others.max(dim=1).values
    return torch.where(answer.isnan() | best.isnan(), torch.nan, (answer > best).to(answer.dtype))


def answer_probability(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B *A"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """Probability of the answer among the candidates: the softmax over those names alone (paper, Figure 5).

    Of a set, the sum of its probabilities.

    Args:
        logits: Logits at the last position.
        answers: The right names.
        candidates: The names of each pair; negative entries are padding. The answer counts as one of them.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    answer, others = _set_logits(logits, answers, "answers"), _other_logits(logits, answers, candidates)
    return torch.cat([answer, others], dim=1).softmax(dim=1)[:, : answer.shape[1]].sum(dim=1)


def vocabulary_probability(logits: Float[Tensor, "B V"], answers: Int[Tensor, "B *A"]) -> Float[Tensor, "B"]:
    """Probability of the answer among all tokens: the softmax over the full vocabulary.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    answer = _set_logits(logits, answers, "answers")
    return (answer - _at_least_float32(logits).logsumexp(dim=1, keepdim=True)).exp().sum(dim=1)


def kl_divergence(patched: Float[Tensor, "B V"], clean: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
    """KL(clean ‖ patched) over the full vocabulary, in nats; 0 where the runs agree.

    A token to which the clean run gives probability 0 adds nothing.

    Raises:
        ValueError: If the shapes are not one [B, V].
    """
    if _check_logits(patched).ndim != 2 or patched.shape != _check_logits(clean).shape:
        raise ValueError(
            f"patched and clean logits must have one shape [B, V], not {tuple(patched.shape)} and {tuple(clean.shape)}"
        )
    log_p = _at_least_float32(clean).log_softmax(dim=1)
    log_q = _at_least_float32(patched).log_softmax(dim=1)
    p = log_p.exp()
    return torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(dim=1)


def _logit(logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B *A"], name: str) -> Float[Tensor, "B"]:
    """Each row's logit of its token, or the mean over its set of them."""
    found = _set_logits(logits, tokens, name)
    if found.shape[1] == 1:
        return found[:, 0]
    there = _ids(tokens, name).to(found.device) >= 0
    return torch.where(there, found, 0).sum(1) / there.sum(1)


def _set_logits(logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B *A"], name: str) -> Float[Tensor, "B A"]:
    """Each row's logits of its tokens; -inf at a set's padding."""
    tokens = _ids(tokens, name)
    if _check_logits(logits).ndim != 2 or tokens.ndim not in (1, 2) or tokens.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"logits must be [B, V] and sets of {name} [B, A], or {name} [B], not {tuple(logits.shape)} and "
            f"{tuple(tokens.shape)}"
        )
    _check_ids(tokens, name, least=-1 if tokens.ndim == 2 else 0, size=logits.shape[1])
    tokens = (tokens if tokens.ndim == 2 else tokens[:, None]).to(logits.device, torch.long)
    if (tokens < 0).all(1).any():
        raise ValueError(f"row {int((tokens < 0).all(1).nonzero()[0])} of {name} holds no token")
    found = _at_least_float32(logits.gather(1, tokens.clamp(min=0)))
    return found.masked_fill(tokens < 0, -torch.inf)


def _other_logits(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B *A"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Each row's logits of its candidates; -inf at padding and at the answer itself."""
    answers, candidates = _ids(answers, "answers"), _ids(candidates, "candidates")
    if candidates.ndim != 2 or len(candidates) != len(logits) or candidates.shape[1] == 0:
        raise ValueError(f"candidates must be [{len(logits)}, K] with K > 0, not {tuple(candidates.shape)}")
    _check_ids(candidates, "candidates", least=None, size=logits.shape[1])
    candidates, answers = candidates.to(logits.device, torch.long), answers.to(logits.device, torch.long)
    found = _at_least_float32(logits.gather(1, candidates.clamp(min=0)))
    answers = answers if answers.ndim == 2 else answers[:, None]
    among = (candidates[:, :, None] == answers[:, None, :]).any(2)
    return found.masked_fill((candidates < 0) | among, -torch.inf)


def _check_logits(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ValueError(f"logits must be a tensor of floats, not {getattr(logits, 'dtype', type(logits).__name__)}")
    return logits


def _ids(tokens: Tensor, name: str) -> Tensor:
    """Token ids, also from an array or a list."""
    if not isinstance(tokens, Tensor):
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must be token ids of an integer type, not {tokens!r:.80}") from None
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must be token ids of an integer type, not {tokens.dtype}")
    return tokens


def _check_ids(tokens: Tensor, name: str, *, least: int | None, size: int) -> None:
    wrong = tokens >= size
    if least is not None:
        wrong = wrong | (tokens < least)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        token = int(tokens[tuple(place)])
        raise ValueError(f"row {place[0]} of {name} holds token {token}, outside the logits' vocabulary of {size}")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
