"""Attribution patching: the effect of resampling a site at every layer and position, from one forward and backward.

To first order, putting the source run's value in place of the clean one changes a row's logit difference by

    sum over the site's dimensions of (source - clean) * d(logit difference)/d(value)

(arXiv 2310.10348). The gradient at all layers and positions comes from one backward pass, so the whole map costs a run
of the source prompts and a forward and backward of the clean ones. `gradients_at` and `gradients_between` are for those
who go along a path from one value to another, as integrated gradients do. What runs in the trace uses torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..memory import backward_bytes, fitting_rows
from ..metrics import measure, normalized
from ..models.model import CausalLM
from ..remote.requests import ask, require_gradients
from ..trace.change import Change
from ..trace.sites import owner
from ..trace.walk import Visitor, logits_at, walk
from .patch import SiteRef, resolve
from .plan import Frozen, Plan, forward
from .positions import read_positions
from .readout import Readout

MOST_ROWS = 64


@torch.inference_mode(False)  # gradients are asked for here, whatever mode the caller is in
def attributed_effects(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    readout: Readout,
    site: str,
    layers: Sequence[int],
    *,
    source: Int[Tensor, "B L"],
    metric: str = "nld",
) -> Float[Tensor, "layers L B"]:
    """Estimates of 1 - NLD (not absolute), or of another metric's loss, with a site resampled at a layer and position.

    Args:
        model: any causal language model whose blocks pass on a residual stream.
        tokens: the clean prompts, ``[B, L]``.
        readout: where each prompt's answers are read.
        site: a site of a layer that has positions.
        layers: which layers.
        source: the corrupt prompts, row for row.
        metric: the metric's name.

    Raises:
        ValueError: for an unknown site or layer, a model that carries edits or hooks or passes more than a residual
            stream between its blocks, or on a server whose sandbox has no gradients.
    """
    refs = [resolve(model, site, layer) for layer in layers]
    model.require_stream("effects by attribution", edges=True)
    require_gradients(model, "attribution patching")
    tokens, source = model.to_tokens(tokens)[0], model.to_tokens(source)[0]
    readout.check(tokens, model.vocab_size)
    ids = [_token_ids(readout, name) for name in ("answers", "corrupt_answers", "candidates")]
    parts = []
    with Frozen(model):
        for rows in torch.arange(len(tokens)).split(_rows_at_once(model, refs, tokens.shape[1])):
            prompts = tokens[rows], source[rows], readout.last[rows], [column[rows] for column in ids]
            parts.append(ask(model, attributed_batch, refs, *prompts, metric)["effects"])
    return torch.cat(parts, dim=2)


def attributed_batch(
    model,
    refs: Sequence[SiteRef],
    clean: Int[Tensor, "B L"],
    corrupt: Int[Tensor, "B L"],
    last: Int[Tensor, "B"],
    ids: Sequence[Tensor],
    metric: str,
) -> dict[str, Float[Tensor, "refs L B"]]:
    """``effects`` on some prompts, here or on a server that has gradients."""
    clean, corrupt = clean.to(model.device), corrupt.to(model.device)
    ids = [column.to(model.device) for column in ids]
    read = read_positions(clean, last)
    assert read is not None  # it is so for "all" alone
    plan = Plan([], list(refs), model.n_layers)
    with torch.no_grad(), model.trace(corrupt):
        there = forward(model, plan, read).save()
    values, corrupt_logits = there
    with torch.enable_grad(), model.trace(clean):
        estimate = estimated(model, refs, values, read, ids, metric).save()  # pyright: ignore[reportAttributeAccessIssue]
    changes, here = estimate
    if metric != "nld":
        return {"effects": -changes.cpu()}
    source = measure(metric, corrupt_logits, *ids).to(here)
    return {"effects": 1 - normalized(here + changes, here, source, absolute=False).cpu()}


def estimated(
    model, refs: Sequence[SiteRef], there: Mapping[str, Tensor], read: Tensor, ids: Sequence[Tensor], metric: str
) -> tuple[Float[Tensor, "refs L B"], Float[Tensor, "B"]]:
    """The body of a trace: the estimated change of the metric (of ``nld``, the logit difference), and its value.

    Args:
        model: a model from `load_model`, in a trace.
        refs: one site at several layers.
        there: the source run's values, by key.
        read: the position to read in each row.
        ids: the answers, the corrupt answers and the candidates.
        metric: its name.
    """
    embedding = model.embedding
    start = embedding.output.detach().requires_grad_()
    embedding.output = start
    visitor = Contracted({ref.layer: ref.key for ref in refs}, refs[0].site.name, there)
    walk(model, visitor)
    value = measure(metric, logits_at(model, read), *ids)
    value.sum().backward()  # to every leaf: the states of `h` are leaves of their own
    return torch.stack([visitor.changes[ref.layer] for ref in refs]), value.detach()


class Contracted(Visitor):
    """Contract the gradient at a site of some layers with how far the source run's value is from the one there.

    Args:
        keys: each layer's key in ``there``.
        site: the site's name.
        there: the source run's values.
    """

    def __init__(self, keys: Mapping[int | None, str], site: str, there: Mapping[str, Tensor]) -> None:
        Visitor.__init__(self)
        self.keys, self.site, self.there = keys, site, there
        self.changes: dict[int | None, Tensor] = {}

    def at(self, model, layer, site):
        if site.name == self.site and layer in self.keys:
            value = getattr(owner(model, site, layer), site.attribute)
            value.register_hook(partial(self.contract, layer, self.there[self.keys[layer]] - value.detach()))

    def contract(self, layer: int | None, difference: Tensor, gradient: Tensor) -> None:
        """Keep the sum over the site's dimensions, ``[L, B]``."""
        self.changes[layer] = (gradient * difference).flatten(2).sum(-1).transpose(0, 1)


@torch.inference_mode(False)
def gradients_at(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    ref: SiteRef,
    value: Float[Tensor, "B L *site"],
    last: Int[Tensor, "B"],
    ids: Sequence[Tensor],
    metric: str,
) -> Float[Tensor, "B L *site"]:
    """The gradient of a metric (of ``nld``, the logit difference) at a site, where it is given a value.

    Args:
        model: any causal language model.
        tokens: the prompts.
        ref: the site, one that has positions.
        value: what the site becomes at every position; of states, each is held.
        last: where each row is read.
        ids: the answers, the corrupt answers and the candidates.
        metric: its name.

    Raises:
        ValueError: on a server whose sandbox has no gradients.
    """
    require_gradients(model, "integrated gradients")
    held = 4 * value[0].numel() * (8 if "N" in ref.site.shape else 3)
    most = fitting_rows(model, backward_bytes(model, tokens.shape[1]) + held, MOST_ROWS)
    parts = []
    with Frozen(model):
        for rows in torch.arange(len(tokens)).split(most):
            columns = [column[rows] for column in ids]
            parts.append(ask(model, gradient_batch, ref, value[rows], tokens[rows], last[rows], columns, metric))
    return torch.cat([part["gradient"] for part in parts])


def gradient_batch(
    model,
    ref: SiteRef,
    value: Float[Tensor, "B L *site"],
    tokens: Int[Tensor, "B L"],
    last: Int[Tensor, "B"],
    ids: Sequence[Tensor],
    metric: str,
) -> dict[str, Float[Tensor, "B L *site"]]:
    """`gradients_at` on some prompts, as ``gradient``, here or on a server that has gradients."""
    tokens = tokens.to(model.device)
    ids = [column.to(model.device) for column in ids]
    read = read_positions(tokens, last)
    assert read is not None  # it is so for "all" alone
    with torch.enable_grad(), model.trace(tokens):
        gradient = held_gradient(model, ref, value.to(model.device), read, ids, metric).save()  # pyright: ignore[reportAttributeAccessIssue]
    return {"gradient": gradient.cpu()}


def held_gradient(model, ref: SiteRef, value: Tensor, read: Tensor, ids: Sequence[Tensor], metric: str) -> Tensor:
    """The body of a trace: put a value at a site, and take the gradient there."""
    leaf = value.detach().clone().requires_grad_()
    plan = Plan([Change(ref.layer, ref.site, leaf, None)], [], model.n_layers)
    measure(metric, forward(model, plan, read)[1], *ids).sum().backward()
    assert leaf.grad is not None  # the site is before the logits
    return leaf.grad


@torch.inference_mode(False)
def gradients_between(
    model: CausalLM,
    tokens: Int[Tensor, "B L"],
    ref: SiteRef,
    value: Float[Tensor, "B L *site"],
    later: SiteRef,
    weights: Float[Tensor, "W B L *later"],
) -> Float[Tensor, "W B L *site"]:
    """The gradients of weighted sums of a later site's value at a site, where it is given a value.

    Args:
        model: any causal language model.
        tokens: the prompts.
        ref: the site, one that has positions.
        value: what the site becomes at every position; of states, each is held.
        later: the later site, one that has positions.
        weights: of each sum, the weight of every number of the later site's value.

    Raises:
        ValueError: on a server whose sandbox has no gradients.
    """
    require_gradients(model, "integrated gradients")
    held = 4 * (value[0].numel() * (8 if "N" in ref.site.shape else 3) + len(weights) * weights[0, 0].numel())
    most = fitting_rows(model, backward_bytes(model, tokens.shape[1]) + held, MOST_ROWS)
    parts = []
    with Frozen(model):
        for rows in torch.arange(len(tokens)).split(most):
            parts.append(ask(model, batch_between, ref, value[rows], later, weights[:, rows], tokens[rows]))
    return torch.cat([part["gradients"] for part in parts], dim=1)


def batch_between(
    model,
    ref: SiteRef,
    value: Float[Tensor, "B L *site"],
    later: SiteRef,
    weights: Float[Tensor, "W B L *later"],
    tokens: Int[Tensor, "B L"],
) -> dict[str, Float[Tensor, "W B L *site"]]:
    """`gradients_between` on some prompts, as ``gradients``, here or on a server that has gradients."""
    tokens, weights = tokens.to(model.device), weights.to(model.device)
    with torch.enable_grad(), model.trace(tokens):
        gradients = held_gradients(model, ref, value.to(model.device), later, weights).save()  # pyright: ignore[reportAttributeAccessIssue]
    return {"gradients": gradients.cpu()}


def held_gradients(model, ref: SiteRef, value: Tensor, later: SiteRef, weights: Tensor) -> Tensor:
    """The body of a trace: put a value at a site, and take the gradients of a later site's weighted sums there."""
    leaf = value.detach().clone().requires_grad_()
    last = model.n_layers if later.layer is None or not model.all_scans else later.layer
    found = forward(model, Plan([Change(ref.layer, ref.site, leaf, None)], [later], last), None)[0][later.key]
    if not found.requires_grad:  # nothing leads from one to the other
        return torch.zeros(len(weights), *leaf.shape, dtype=leaf.dtype, device=leaf.device)
    sums = [(found * one).sum() for one in weights]
    return torch.stack([torch.autograd.grad(one, leaf, retain_graph=True, materialize_grads=True)[0] for one in sums])


def _token_ids(readout: Readout, name: str) -> Tensor:
    """The tokens of a readout's columns, sets padded with -1."""
    columns = getattr(readout, name)
    ids = readout.tokens.gather(1, (columns if columns.dim() == 2 else columns[:, None]).clamp(min=0))
    return ids.where(columns >= 0, -1) if columns.dim() == 2 else ids[:, 0]


def _rows_at_once(model: CausalLM, refs: Sequence[SiteRef], length: int) -> int:
    """How many rows to run at once. Where states are looked at, the backward pass keeps several of them."""
    sizes = {"B": 1, "L": length, **model.sizes()}
    one = math.prod(sizes[letter] for letter in refs[0].site.shape)
    held = 4 * len(refs) * one * (8 if "N" in refs[0].site.shape else 3)
    return fitting_rows(model, backward_bytes(model, length) + held, MOST_ROWS)
