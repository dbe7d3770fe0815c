"""Where a prompt ends: whether rows of tokens are read at their last token, and not at padding.

Tokens alone do not say which of them are padding. What they show is looked at: what stands after the last positions,
and whether a prompt ends in the token with which every prompt begins, which pads in GPT-NeoX's and GPT-2's tokenizers.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def check_padding(
    clean: Int[Tensor, "B L"], corrupt: Int[Tensor, "B L"], last: Int[Tensor, "B"], *, given: bool
) -> None:
    """Refuse pairs of which one prompt is padded where the other still goes on, as far as the tokens show it.

    * After the last position both prompts hold the same.
    * If one token fills all that stands after the last positions, it is padding, and no prompt that ends in it stands
      beside one that does not: in the other half of its pair, or in another row.
    * So where every prompt begins with token 0, which pads in the tokenizers of Mamba models; and with another token
      that pads, where one prompt is the other's end, moved to the left by that token.

    Args:
        clean: the clean prompts.
        corrupt: the corrupt prompts.
        last: where each row ends.
        given: whether a user said so; else it is the last column, and rows may end in padding.

    Raises:
        ValueError: if so.
    """
    if clean.numel() == 0:
        return
    after = torch.arange(clean.shape[1], device=clean.device) > last[:, None]
    apart = after & (clean != corrupt)
    if apart.any():
        row, position = apart.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: the clean and the corrupt prompt differ in length; they differ after position "
            f"{int(last[row])}, where last_position says that they end: clean_tokens holds "
            f"{int(clean[row, position])} at position {position}, corrupt_tokens {int(corrupt[row, position])}"
        )
    filling = clean[after].unique().tolist()
    if len(filling) == 1:
        check_ends(clean, corrupt, last, filling[0], "which fills the rows after last_position")
    first = torch.cat([clean[:, 0], corrupt[:, 0]]).unique().tolist()
    if len(first) == 1 and clean.shape[1] > 1:
        reason = "with which every prompt begins"
        if first[0] == 0:
            check_ends(clean, corrupt, last, 0, reason, both=not given)
        else:
            moved = _is_moved(clean, corrupt, last, first[0]) | _is_moved(corrupt, clean, last, first[0])
            check_ends(clean[moved], corrupt[moved], last[moved], first[0], reason, rows=moved.nonzero()[:, 0].tolist())


def check_ends(
    clean: Int[Tensor, "B L"],
    corrupt: Int[Tensor, "B L"],
    last: Int[Tensor, "B"],
    pad: int,
    reason: str,
    *,
    both: bool = True,
    rows: list[int] | None = None,
) -> None:
    """Refuse a prompt that ends in the token ``pad`` beside one that does not.

    Args:
        clean: the clean prompts.
        corrupt: the corrupt prompts.
        last: where each row ends.
        pad: the token that pads.
        reason: how that is known.
        both: whether to refuse pairs, too, of which both prompts end so where other rows' do not.
        rows: the rows' numbers for the user, if not 0, 1, 2, ….

    Raises:
        ValueError: if there is one.
    """
    ends = torch.stack([tokens.gather(1, last[:, None])[:, 0] == pad for tokens in (clean, corrupt)])
    one = (ends[0] != ends[1]).nonzero()[:, 0].tolist()
    if one:
        shorter, longer = ("clean", "corrupt") if ends[0, one[0]] else ("corrupt", "clean")
        row = one[0] if rows is None else rows[one[0]]
        raise ValueError(
            f"row {row}: the clean and the corrupt prompt differ in length; at last_position {int(last[one[0]])} "
            f"{shorter}_tokens holds {pad}, {reason}, and {longer}_tokens does not: the {shorter} prompt is shorter"
        )
    if both and ends.any() and not ends.all():
        row = int(ends.all(0).nonzero()[0, 0])
        raise ValueError(
            f"row {row}: at last_position {int(last[row])} clean_tokens and corrupt_tokens hold {pad}, {reason}, and "
            f"other rows do not: the prompt has ended there; give last_position, the position of its last token"
        )


def _is_moved(shorter: Tensor, longer: Tensor, last: Tensor, pad: int) -> Tensor:
    """Which rows end in the same token, the shorter prompt's being followed by ``pad`` up to the last position."""
    positions = torch.arange(shorter.shape[1], device=shorter.device)
    end = torch.where((positions <= last[:, None]) & (shorter != pad), positions, -1).amax(1)
    same = shorter.gather(1, end.clamp(min=0)[:, None]) == longer.gather(1, last[:, None])
    return (end >= 0) & (end < last) & same[:, 0]
