"""`Splice`: a dictionary of features, such as a sparse autoencoder's, put into a run as a `Patch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import integers, real_number


@dataclass(frozen=True, eq=False)
class Splice:
    """What a dictionary makes of a value: ``Patch("ssm_input", 3, Splice(sae, features=[7], value=0.0))``.

    Its features are encoded, changed, and decoded. Works wherever a callable `Patch` does. Along ``h`` each state is
    encoded as it has become, ``[B, 1, E, N]``.

    Attributes:
        sae: anything with ``encode`` (``[..., W] -> [..., F]``) and ``decode`` (``[..., F] -> [..., W]``), W being the
            width of the site; a module of torch is given values in the precision and on the device of its parameters.
        keep_error: whether what the dictionary does not explain, x - decode(encode(x)), is added again (arXiv
            2403.19647). Then a splice without features changes nothing, but for rounding.
        features: which features to change, counted from 0; None for none.
        value: what ``features`` become: a number, or a tensor that is broadcast to them, ``[..., len(features)]``;
            None: they stay as they are, and all others become 0.

    Raises:
        ValueError: when it is made: for what has no ``encode`` and ``decode``, features that are no whole numbers or
            named twice, or a value without features. In a run: for a feature that the dictionary does not have, or a
            value that does not fit.
    """

    sae: Any
    keep_error: bool = True
    features: int | Sequence[int] | None = None
    value: float | Float[Tensor, "*shape"] | None = None

    def __post_init__(self) -> None:
        for name in ("encode", "decode"):
            if not callable(getattr(self.sae, name, None)):
                raise ValueError(f"a splice needs encode and decode, and {type(self.sae).__name__} has no {name}")
        if self.features is None:
            if self.value is not None:
                raise ValueError(f"value={self.value!r:.60} without features: say which features are to become that")
            return
        chosen = integers(self.features, "feature")
        if any(one < 0 for one in chosen) or len(set(chosen)) < len(chosen):
            raise ValueError(f"features are counted from 0, and each is named once, not {chosen}")
        object.__setattr__(self, "features", chosen)
        if self.value is not None and not isinstance(self.value, Tensor):
            number = real_number(self.value)
            if number is None:
                raise ValueError(f"a feature's value is a number or a tensor, not {self.value!r:.60}")
            object.__setattr__(self, "value", float(number))

    def __call__(self, there: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        """What takes the place of a value."""
        x = as_its_own(self.sae, there)
        found = self.sae.encode(x)
        new = self.sae.decode(self.changed(found))
        if self.keep_error:
            new = new + (x - self.sae.decode(found))
        return new.to(there)

    def changed(self, found: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
        """The features, once some are changed."""
        if self.features is None:
            return found
        chosen, size = list(self.features), found.shape[-1]  # pyright: ignore[reportArgumentType]
        if chosen and max(chosen) >= size:
            raise ValueError(f"the dictionary has {size} features, 0 to {size - 1}, not {max(chosen)}")
        if self.value is None:
            new = torch.zeros_like(found)
            new[..., chosen] = found[..., chosen]
            return new
        new, value = found.clone(), self.value
        if isinstance(value, Tensor):
            target = found[..., chosen].shape
            try:
                value = value.to(found).expand(target)
            except RuntimeError:
                raise ValueError(
                    f"a value of shape {tuple(value.shape)} does not fit the features there, {tuple(target)}"
                ) from None
        new[..., chosen] = value
        return new


def as_its_own(sae: Any, value: Tensor) -> Tensor:
    """A value in the precision and on the device of a dictionary's parameters, if it has some."""
    if isinstance(sae, torch.nn.Module):
        for parameter in sae.parameters():
            return value.to(parameter.device, parameter.dtype)
    return value
