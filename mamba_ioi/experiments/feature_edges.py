"""Features as nodes: which features of a dictionary at one site drive which of another at a later site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import integers, whole_number
from ..interventions.attribution import gradients_between
from ..interventions.patch import Patch, SiteRef
from ..interventions.run import cache
from ..interventions.splice import as_its_own
from ..memory import fitting_rows, site_bytes
from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import PromptPairs
from .common import check_data, mean_where
from .feature_effects import ERROR, Encoded, both_runs, check_dictionary, feature_effects

ROUNDING = 1e-10
"""What share of the squared change of all features, and the error, is taken for none."""
Dictionary = tuple[Any, str, int]
"""Anything with ``encode`` and ``decode``, and the site and the layer whose values it encodes."""


@torch.inference_mode(False)  # gradients are asked for here, whatever mode the caller is in
def feature_edges(
    model: CausalLM,
    pairs: PromptPairs,
    upstream: Dictionary,
    downstream: Dictionary,
    *,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    top: int = 10,
    steps: int = 10,
    progress: bool = True,
) -> Result:
    """Which features of a dictionary at one site drive which features of one at a later site.

    An edge is measured in the clean prompts: the source takes its value of the corrupt prompts at all positions, all
    other features there and the error stay the clean run's, and the target is read. Its effect is how far the target
    goes, on all ways between the two sites: the change of its values at all positions, projected onto the change that
    it makes from the clean run to the corrupt one, over the mean length of that change. 1: as far as in the corrupt
    prompts; 0: not at all. The estimate is of the same, by integrated gradients (arXiv 2403.19647) along the path of
    `feature_effects`. So the estimates into a target add up, over all sources, to the effect of the whole site on it.
    What features do for the answer, the end of every way, is `feature_effects`.

    Args:
        model: any causal language model.
        pairs: pairs of prompts.
        upstream: the dictionary whose features are changed, its site and its layer: ``(sae, "ssm_input", 1)``.
        downstream: the dictionary whose features are read, its site and its layer, later in the model.
        sources: features of ``upstream``, -1 for what it leaves unexplained. If None, the ``top`` ones whose estimated
            effects on the answer are largest, whatever their sign, and -1.
        targets: features of ``downstream``, likewise.
        top: how many features are chosen where none are named.
        steps: at how many points of the path gradients are taken, the middles of as many parts.
        progress: show a bar.

    Returns:
        A row for each source and target, the largest effects first: ``source``, ``target`` (-1: what the dictionary
        leaves unexplained), ``effect`` (over all rows; NaN where the target is alike in clean and corrupt prompts),
        ``low`` and ``high`` (its bootstrap 95 % interval), ``estimate`` (of it), ``n`` (rows).

    Raises:
        ValueError: as `feature_effects`; for sites that do not follow one another, or a feature that is not there.
    """
    check_data(model, pairs)
    top, steps = whole_number(top, "top", least=1), whole_number(steps, "steps", least=1)
    above, below = Side.of(model, upstream, "upstream"), Side.of(model, downstream, "downstream")
    if not above.place(model) < below.place(model):
        raise ValueError(f"{below.ref.key} does not come after {above.ref.key}, so that it could be driven from there")
    chosen = (
        above.features(model, pairs, sources, "sources", top, steps),
        below.features(model, pairs, targets, "targets", top, steps),
    )
    moved, estimates, spans = [], [], []
    parts = list(_parts(model, pairs, above.ref, below.ref, len(chosen[1])))
    with tqdm(total=len(parts) * (steps + len(chosen[0])), desc="feature_edges", disable=not progress) as bar:
        for part in parts:
            path, change = Path.of(model, part, above), Change.of(part, Path.of(model, part, below), chosen[1])
            spans.append(torch.cat([change.along(change.end), change.size()[None]]))
            moved.append(_measured(model, part, path, below, change, chosen[0], bar))
            estimates.append(_estimated(model, part, path, below, change, chosen[0], steps, bar))
    *span, whole = torch.cat(spans, dim=1).double().mean(1)[:, None]
    span = torch.stack(span).where(torch.stack(span) > ROUNDING * whole, torch.nan)  # of each target
    effects, estimate = (torch.cat(one, dim=2).double() / span for one in (moved, estimates))
    table = pd.DataFrame([(one, other) for one in chosen[0] for other in chosen[1]], columns=["source", "target"])
    effects = effects.flatten(0, 1)
    table["effect"], table["low"], table["high"] = mean_where(effects, effects.isfinite())
    table["estimate"] = estimate.mean(2).flatten().numpy()
    table["n"] = len(pairs)
    table = table.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
    arguments: dict[str, Any] = {"steps": steps, "rows": len(pairs)}
    for name, side in (("upstream", above), ("downstream", below)):
        arguments[name] = {"sae": type(side.sae).__name__, "site": side.ref.site.name, "layer": side.ref.layer}
    return Result.create("feature_edges", table, model=model, arguments=arguments)


@dataclass(frozen=True)
class Side:
    """A dictionary, and the site whose values it encodes."""

    sae: Any
    ref: SiteRef

    @classmethod
    def of(cls, model: CausalLM, given: Any, name: str) -> Side:
        """What is given as one.

        Raises:
            ValueError: if it is none.
        """
        if not isinstance(given, tuple) or len(given) != 3:
            raise ValueError(f"{name} is a dictionary with its site and layer, (sae, 'out_proj', 1), not {given!r:.60}")
        return cls(given[0], check_dictionary(model, *given))

    def place(self, model: CausalLM) -> tuple[int, int]:
        """Where the site stands in the order of execution."""
        layer = self.ref.layer or 0
        return layer, model.sites_of(layer).index(self.ref.site.name)

    def features(
        self, model: CausalLM, pairs: PromptPairs, given: Sequence[int] | None, name: str, top: int, steps: int
    ) -> list[int]:
        """The features that are named, or those that matter most for the answer and the error.

        Raises:
            ValueError: for none, one that the dictionary does not have, or one that is named twice.
        """
        if given is None:
            where = self.ref.site.name, self.ref.layer or 0
            found = feature_effects(model, pairs, self.sae, *where, top=0, steps=steps, progress=False).table["feature"]
            return [*map(int, found[found != ERROR][:top]), ERROR]
        chosen = integers(given, "feature")
        value = cache(model, pairs.clean_tokens[:1], [self.ref.key])[self.ref.key]
        size = Encoded.of(self.sae, value).features.shape[-1]
        if not chosen or len(set(chosen)) < len(chosen) or not all(ERROR <= one < size for one in chosen):
            raise ValueError(f"{name} are features from 0 to {size - 1}, or -1 for the error, each once, not {chosen}")
        return chosen


@dataclass(frozen=True)
class Path:
    """A site's values from the clean run to the corrupt one, as a dictionary has them."""

    side: Side
    start: Encoded
    end: Encoded
    dtype: torch.dtype

    @classmethod
    def of(cls, model: CausalLM, pairs: PromptPairs, side: Side) -> Path:
        """That of some pairs."""
        values = both_runs(model, pairs, side.ref)
        start, end = (Encoded.of(side.sae, value) for value in values)
        return cls(side, start, end, values[0].dtype)

    def reached(self, model: CausalLM, pairs: PromptPairs, value: Tensor, below: Side) -> Tensor:
        """The later site's value in the clean prompts, once this one has another value."""
        patch = Patch(self.side.ref.site.name, self.side.ref.layer, value.to(self.dtype))
        return cache(model, pairs.clean_tokens, [below.ref.key], patches=[patch])[below.ref.key]


@dataclass(frozen=True)
class Change:
    """What some features of a dictionary, or its error, change by from the clean run to the corrupt one.

    Attributes:
        names: the features; -1 for the error.
        start: the clean run's values.
        end: the corrupt run's values.
        toward: the change, 0 after each row's last position.
    """

    names: list[int]
    start: Encoded
    end: Encoded
    toward: Encoded

    @classmethod
    def of(cls, pairs: PromptPairs, path: Path, names: list[int]) -> Change:
        """That of some pairs."""
        there = torch.arange(pairs.clean_tokens.shape[1]) <= pairs.last_position.cpu()[:, None]

        def change(one: Tensor, other: Tensor) -> Tensor:
            return (other - one) * there.view(*there.shape, *[1] * (one.dim() - 2)).to(one.device)

        start, end = path.start, path.end
        toward = Encoded(change(start.features, end.features), change(start.error, end.error))
        return cls(names, start, end, toward)

    def along(self, value: Encoded) -> Float[Tensor, "T B"]:
        """How far each row's values are from the clean run's, projected onto the change."""
        features = ((value.features - self.start.features) * self.toward.features).flatten(1, -2).sum(1)
        error = ((value.error - self.start.error) * self.toward.error).flatten(1).sum(1)
        return torch.stack([error if name == ERROR else features[:, name] for name in self.names]).cpu()

    def size(self) -> Float[Tensor, "B"]:
        """The squared change of all features and of the error."""
        features, error = (one.flatten(1).pow(2).sum(1) for one in (self.toward.features, self.toward.error))
        return (features + error).cpu()

    def weights(self, sae: Any, value: Float[Tensor, "B L *site"]) -> Float[Tensor, "T B L *site"]:
        """The gradient, at the site's value, of what `along` says of it."""
        x = as_its_own(sae, value.clone()).requires_grad_()
        with torch.enable_grad():
            features = sae.encode(x)
            error = ((x - sae.decode(features)) * self.toward.error).sum()
            each = (features * self.toward.features).flatten(0, -2).sum(0)
            sums = [error if name == ERROR else each[name] for name in self.names]
            found = [torch.autograd.grad(one, x, retain_graph=True, materialize_grads=True)[0] for one in sums]
        return torch.stack(found).to(value)


def _parts(model: CausalLM, pairs: PromptPairs, ref: SiteRef, later: SiteRef, targets: int) -> Iterator[PromptPairs]:
    """The pairs, some at a time: as many as the memory holds gradients of."""
    length = pairs.clean_tokens.shape[1]
    row = (targets + 12) * (site_bytes(model, ref.site, length) + site_bytes(model, later.site, length))
    rows = fitting_rows(model, row, len(pairs), share=0.5)
    for start in range(0, len(pairs), rows):
        yield pairs[start : start + rows]


def _measured(
    model: CausalLM, pairs: PromptPairs, path: Path, below: Side, change: Change, sources: list[int], bar: tqdm
) -> Float[Tensor, "S T B"]:
    """How far each source takes each target."""
    found = []
    for name in sources:
        value = path.reached(model, pairs, path.start.with_one(path.side.sae, path.end, name), below)
        found.append(change.along(Encoded.of(below.sae, value)))
        bar.update()
    return torch.stack(found)


def _estimated(
    model: CausalLM,
    pairs: PromptPairs,
    path: Path,
    below: Side,
    change: Change,
    sources: list[int],
    steps: int,
    bar: tqdm,
) -> Float[Tensor, "S T B"]:
    """The same as integrated gradients have it."""
    here, there = path.start, path.end
    found = torch.zeros(len(sources), len(change.names), len(pairs))
    for step in range(steps):
        at = (step + 0.5) / steps
        features = torch.lerp(here.features, there.features, at).requires_grad_()
        with torch.enable_grad():
            made = path.side.sae.decode(features)
        value = (made.detach() + torch.lerp(here.error, there.error, at)).to(path.dtype)
        weights = change.weights(below.sae, path.reached(model, pairs, value, below))
        gradients = gradients_between(model, pairs.clean_tokens, path.side.ref, value, below.ref, weights)
        for target, gradient in enumerate(gradients.to(made)):
            (of_features,) = torch.autograd.grad(made, features, gradient, retain_graph=True)
            each = (of_features * (there.features - here.features)).flatten(1, -2).sum(1)
            error = (gradient * (there.error - here.error)).flatten(1).sum(1)
            rows = [error if name == ERROR else each[:, name] for name in sources]
            found[:, target] += torch.stack(rows).cpu() / steps
        bar.update()
    return found
