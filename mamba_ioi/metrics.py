"""What a run's logits say about the task: pure, differentiable functions of last-position logits.

Logits are [B, V], one row a prompt at its own last position; results are [B]. Half-precision logits are read
as float32. A row with NaN among the logits it needs gives NaN, never a number. Token ids may lie on another
device than the logits. Definitions: the paper, Section 3 and Appendix B (arXiv 2407.14008).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def logit_diff(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B"], corrupt_answers: Int[Tensor, "B"]
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
    answers: Int[Tensor, "B"],
    corrupt_answers: Int[Tensor, "B"],
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
    least = logit_diff(corrupt, answers, corrupt_answers)
    spread = logit_diff(clean, answers, corrupt_answers) - least
    if absolute:
        spread = spread.abs()
    spread = torch.where(spread == 0, torch.ones_like(spread), spread)
    return (logit_diff(patched, answers, corrupt_answers) - least) / spread


def accuracy(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """1 where the answer's logit is above that of every other candidate, else 0; a tie counts as wrong.

    Args:
        logits: Logits at the last position.
        answers: The right names.
        candidates: The names of each pair; negative entries are padding. The answer counts as one of them.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    answer, others = _logit(logits, answers, "answers"), _other_logits(logits, answers, candidates)
    best = others.max(dim=1).values
    return torch.where(answer.isnan() | best.isnan(), torch.nan, (answer > best).to(answer.dtype))


def answer_probability(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B"]:
    """Probability of the answer among the candidates: the softmax over those names alone (paper, Figure 5).

    Args:
        logits: Logits at the last position.
        answers: The right names.
        candidates: The names of each pair; negative entries are padding. The answer counts as one of them.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    answer, others = _logit(logits, answers, "answers"), _other_logits(logits, answers, candidates)
    return torch.cat([answer[:, None], others], dim=1).softmax(dim=1)[:, 0]


def vocabulary_probability(logits: Float[Tensor, "B V"], answers: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Probability of the answer among all tokens: the softmax over the full vocabulary.

    Raises:
        ValueError: If a shape is wrong or a token id lies outside the vocabulary.
    """
    answer = _logit(logits, answers, "answers")
    return (answer - _at_least_float32(logits).logsumexp(dim=1)).exp()


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


def _logit(logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B"], name: str) -> Float[Tensor, "B"]:
    """Each row's logit of its token."""
    tokens = _ids(tokens, name)
    if _check_logits(logits).ndim != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [B, V] and {name} [B], not {tuple(logits.shape)} and {tuple(tokens.shape)}")
    _check_ids(tokens, name, least=0, size=logits.shape[1])
    return _at_least_float32(logits.gather(1, tokens.to(logits.device, torch.long)[:, None])[:, 0])


def _other_logits(
    logits: Float[Tensor, "B V"], answers: Int[Tensor, "B"], candidates: Int[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Each row's logits of its candidates; -inf at padding and at the answer itself."""
    answers, candidates = _ids(answers, "answers"), _ids(candidates, "candidates")
    if candidates.ndim != 2 or len(candidates) != len(logits) or candidates.shape[1] == 0:
        raise ValueError(f"candidates must be [{len(logits)}, K] with K > 0, not {tuple(candidates.shape)}")
    _check_ids(candidates, "candidates", least=None, size=logits.shape[1])
    candidates, answers = candidates.to(logits.device, torch.long), answers.to(logits.device, torch.long)
    found = _at_least_float32(logits.gather(1, candidates.clamp(min=0)))
    return found.masked_fill((candidates < 0) | (candidates == answers[:, None]), -torch.inf)


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
