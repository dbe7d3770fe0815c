"""What a model carries beside its weights: nnsight's edits and torch's hooks, which see whole prompts' positions.

An edit or hook that zeroes position 0 zeroes the prompt's position p in a run that begins at p, and one that looks at
the batch sees other rows in a run that shares them out. Whoever shortens, skips or rearranges asks here first.

What runs in a trace uses torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules import module as torch_module

_HARMLESS = ("accelerate", "transformers", "torch.nn.utils", "torch.distributed")
"""Packages whose hooks place, compute or record tensors, whatever the positions and rows."""
_FORWARD = {"a forward hook": "_forward_hooks", "a forward pre-hook": "_forward_pre_hooks"}
_BACKWARD = {"a backward hook": "_backward_hooks", "a backward pre-hook": "_backward_pre_hooks"}


def hooks(model, *, backward: bool = False) -> Iterator[tuple[str, str]]:
    """The hooks that somebody put on the model's modules, or on all modules: what it is, and the module's path.

    Args:
        model: a model from `load_model`.
        backward: whether hooks on gradients count.
    """
    kinds = _FORWARD | (_BACKWARD if backward else {})
    for kind, attribute in kinds.items():
        if _foreign(getattr(torch_module, f"_global{attribute}")):
            yield kind, "every module"
    for path, part in model._module.named_modules():
        for kind, attribute in kinds.items():
            if _foreign(getattr(part, attribute)):
                yield kind, path


def _foreign(registered) -> bool:
    for hook in registered.values():
        hook = getattr(hook, "func", hook)  # of a partial
        home = getattr(hook, "__module__", None) or type(hook).__module__
        if not any(f"{home}.".startswith(f"{package}.") for package in _HARMLESS):
            return True
    return False


def refuse_touched(model, what: str, *, gradients: bool = False) -> None:
    """Refuse a model that carries edits or hooks, for ``what`` cuts, skips or rearranges its runs.

    Args:
        model: a model from `load_model`.
        what: what is refused, in the plural.
        gradients: whether hooks on gradients count.

    Raises:
        ValueError: naming the first edit or hook, and how to remove it.
    """
    if model._edits:
        raise ValueError(
            f"{what} need runs that are cut and rearranged, where the edits of {model.model_id} would act at other "
            f"positions or rows: remove them with clear_edits(), or pass the model that was edited"
        )
    for kind, path in hooks(model, backward=gradients):
        raise ValueError(
            f"{what} need runs that are cut and rearranged, where {kind} on {path or 'the model'} would act at other "
            f"positions or rows: remove it"
        )


def refuse_hooked_output(model, paths: dict[str, str]) -> None:
    """Refuse to read or write what hooks change afterwards: nnsight serves a module's output before its forward hooks.

    Args:
        model: a model from `load_model`.
        paths: of modules, each with the site that is served there.

    Raises:
        ValueError: naming the first of these sites whose module has a forward hook; for a remote model, if any module
            has a hook, which does not travel.
    """
    for kind, path in hooks(model):
        if model.remote is not None:
            raise ValueError(
                f"{kind} on {path or 'the model'} does not act on a remote model: remove it, or use edit()"
            )
        if kind == "a forward hook" and (path in paths or path == "every module"):
            site = paths.get(path, next(iter(paths.values())))
            raise ValueError(
                f"{kind} on {path or 'the model'} changes the site {site!r} after it can be read or written: remove "
                f"the hook, or make its change a Patch"
            )
