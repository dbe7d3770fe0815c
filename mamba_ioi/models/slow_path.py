"""The check at load: our own conv and scan, on which the sites inside stand, give what the untouched model gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from nnsight import TransformersModel
from torch import Tensor

from ..trace.anatomy import output_logits, relative_difference, short_prompt
from ..trace.location import StageSite, logits_of
from ..trace.sites import owner
from ..trace.walk import Visitor, walk
from .weights import dtype_name, refuse_not_finite


def check_slow_path(model: TransformersModel) -> float:
    """Compare our own conv and scan with the untouched model, at every layer and at the logits, on a short prompt.

    Each layer is given the untouched model's residual stream, since the roundings of many layers add up.

    Returns:
        The largest difference, relative to the largest value at its site.

    Raises:
        ValueError: naming the first site that differs, or saying that the logits are not finite.
    """
    differences = {site: float(difference) for site, difference in slow_path_differences(model).items()}
    if list(differences) == ["hook_logits"]:
        for name, parameter in model._module.named_parameters():
            if not parameter.is_meta:
                refuse_not_finite(name, parameter.detach(), parameter.dtype)
    return judge_slow_path(model.model_id, differences, model.dtype)


def slow_path_differences(model: TransformersModel) -> dict[str, Tensor]:
    """How far the slow path is from the untouched model at each site, relative to the largest value there.

    NaN for the logits if they are not finite.
    """
    ids = short_prompt(model, 6)
    with torch.no_grad(), model.trace(ids):
        logits = logits_of(model.output).save()  # pyright: ignore[reportAttributeAccessIssue]
    if not logits.isfinite().all():
        return {"hook_logits": torch.tensor(float("nan"))}
    plain = _main_sites(model, ids) | {"hook_logits": logits}
    ours = _main_sites(model, ids, slow=True, stream=plain)
    return {key: relative_difference(ours[key], plain[key]) for key in plain}


def judge_slow_path(model_id: str, differences: Mapping[str, float], dtype: torch.dtype) -> float:
    """The largest of `slow_path_differences`, if none is too large.

    Raises:
        ValueError: as `check_slow_path`.
    """
    if list(differences) == ["hook_logits"]:
        raise ValueError(
            f"{model_id} gives logits that are not finite in {dtype_name(dtype)}, which holds nothing beyond "
            f"{torch.finfo(dtype).max:g}, unless its weights hold NaN: load it with another dtype, such as float32"
        )
    for site, difference in differences.items():
        if not difference <= slow_path_tolerance(dtype):
            raise ValueError(
                f"the slow path does not reproduce {model_id}: the first site that differs is {site}, by "
                f"{difference:.1e} of the largest value there; the logits differ by {differences['hook_logits']:.1e}"
            )
    return max(differences.values())


def served_model(model: TransformersModel) -> dict[str, Tensor]:
    """What a server runs: a value of the activations' ``dtype``, whether weights are there (``trusted``), and, of a
    Mamba, `slow_path_differences`."""
    with torch.no_grad(), model.trace(torch.zeros(1, 1, dtype=torch.long)):
        resid = model.layers[0].input[0, 0, 0].save()
    trusted = next(model._module.parameters()).device.type != "meta"
    found = {"dtype": resid, "trusted": torch.tensor(trusted)}
    return found | (slow_path_differences(model) if model.has_scans else {})


def slow_path_tolerance(dtype: torch.dtype) -> float:
    """How far the slow path may be from the untouched model, relative to the largest value at a site."""
    return 5e-2 if torch.finfo(dtype).bits < 32 else 1e-4


class Compared(Visitor):
    """Keep the values at the inputs and outputs of each layer's modules and operations.

    Args:
        slow: whether our own conv, as a sum of terms, and our own scan take the place of the model's.
        stream: where the residual stream before each layer is taken from, if it is not the run's own.
    """

    def __init__(self, slow: bool, stream: Mapping[str, Tensor] | None) -> None:
        Visitor.__init__(self)
        self.replaces, self.stream = slow, stream
        self.found: dict[str, Tensor] = {}

    def opened(self, layer, stages):
        if stages.KIND == "conv":
            stages.set("conv_slice", stages.peek("conv_slice"))

    def at(self, model, layer, site):
        if layer is None or isinstance(getattr(type(owner(model, site, layer)), site.attribute), StageSite):
            return
        hook = f"blocks.{layer}.hook_"
        if site.name == "out_proj":
            self.found[hook + "after_skip"] = model.layers[layer].mixer.out_proj.input
        if site.name == "resid_pre" and self.stream is not None:
            model.layers[layer].resid_pre = self.stream[hook + "resid_pre"]
        self.found[hook + site.name] = getattr(owner(model, site, layer), site.attribute)


def _main_sites(
    model: TransformersModel, ids: Int[Tensor, "B L"], *, slow: bool = False, stream: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The sites of each layer's path and the logits; the arguments are those of `Compared`."""
    with torch.no_grad(), model.trace(ids):
        visitor = Compared(slow, stream)
        walk(model, visitor)
        visitor.found["hook_norm"] = model.final_norm.output
        visitor.found["hook_logits"] = output_logits(model)
        found = visitor.found.save()  # pyright: ignore[reportAttributeAccessIssue]
    return found
