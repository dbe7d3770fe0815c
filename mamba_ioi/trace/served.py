"""Which names of an envoy can be assigned to: nnsight takes any name, and a value under a wrong one would be lost.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import torch
from nnsight import Envoy


class NoSuchName(AttributeError, ValueError):
    """A name that an envoy does not serve, or that cannot be assigned to."""


class Served(Envoy):
    """What makes an envoy refuse values under names that it does not serve.

    Once it is built, these can be assigned to: sites and whatever else is a property with a setter (``output``,
    ``input``, ``inputs``), what is there already (``model.memory``, ``model.tokenizer``), a `torch.nn.Module` under a
    name of its own, which nnsight attaches, a callable in place of a method, and names that begin with an underscore;
    on the model itself also any name that is like none of these.
    """

    _built = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._built and not name.startswith("_"):
            if getattr(self._module, name, self) is value:
                return  # the end of `module.weight *= 2`, which has happened in place
            refusal = _refusal(self, name, value)
            if refusal is not None:
                raise NoSuchName(refusal)
        Envoy.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return Envoy.__getattr__(self, name)
        except AttributeError:
            if name.startswith("_") or not self._built or hasattr(type(self), name) or name in _declared(self):
                raise
        raise NoSuchName(_unknown(self, name))


class ServedEnvoy(Served):
    """The envoy of any module below the model."""

    def __init__(self, *args, **kwargs) -> None:
        Envoy.__init__(self, *args, **kwargs)
        self._built = True


class SkipMethod:
    """nnsight's ``skip`` of a mixer, whose gate is the site ``skip``."""

    def __init__(self, mixer: Envoy) -> None:
        self.mixer = mixer

    def __call__(self, replacement: Any) -> None:
        """Skip the mixer, returning ``replacement`` as its output."""
        Envoy.skip(self.mixer, replacement)

    def __getattr__(self, name: str):
        raise NoSuchName(_skip_is_a_method(self))

    def __getitem__(self, index):
        raise NoSuchName(_skip_is_a_method(self))

    def __setitem__(self, index, value) -> None:
        raise NoSuchName(_skip_is_a_method(self))


def _skip_is_a_method(skip: SkipMethod) -> str:
    mixer = _spelled(skip.mixer.path)
    return f"{mixer}.skip is nnsight's method, which skips the mixer: read and edit the gate as {mixer}.gate"


def _refusal(envoy: Envoy, name: str, value: Any) -> str | None:
    """Why a value cannot be assigned to a name of an envoy, in a sentence; None if it can be."""
    where = f"{_spelled(envoy.path)}.{name}"
    known = getattr(type(envoy), name, None)
    attaches = isinstance(value, torch.nn.Module)
    if isinstance(known, property):
        if type(known).__set__ is property.__set__ and known.fset is None:  # an eproperty has a __set__ of its own
            return f"{where} is read only"
        return f"{where} is a value of the run, and no place for a module" if attaches else None
    if hasattr(type(envoy), name):
        is_method = callable(known) and not callable(value)
        return f"{where} is a method, and takes no value{_at_its_owner(envoy, name)}" if is_method else None
    if attaches:
        return None
    if isinstance(envoy.__dict__.get(name), Envoy):
        return f"{where} is a module: assign to {where}.output{_at_its_owner(envoy, name)}"
    if name in envoy.__dict__ or name in _declared(envoy):
        return None
    if hasattr(envoy._module, name):
        return (
            f"{where} is the module's own and no value of the run{_at_its_owner(envoy, name)}; what is to last is "
            f"changed at {_spelled(envoy.path)}._module.{name}"
        )
    if not isinstance(envoy, ServedEnvoy) and _meant(envoy, name, nearness=0.8) is None:
        return None  # a user's own note on the model, which is like no name of ours
    return _unknown(envoy, name)


def _unknown(envoy: Envoy, name: str) -> str:
    """That an envoy has no such name, and which one may be meant."""
    values = ", ".join([*_sites(envoy), "output", "input", "inputs"])
    known = f"{_spelled(envoy.path)} has no {name!r}: what can be assigned to are {values}"
    return _meant(envoy, name) or known


def _meant(envoy: Envoy, name: str, nearness: float = 0.6) -> str | None:
    """The sentence that says which name may be meant, if any is as near as that (1: the same letters)."""
    where = _spelled(envoy.path)
    short = name.removeprefix("hook_")
    values = [*_sites(envoy), "output", "input", "inputs"]
    own = [*values, *(other for other in [*envoy.__dict__, *_declared(envoy)] if not other.startswith("_"))]
    places = {other: f"{where}.{other}" for other in own}
    for other in _relatives(envoy):
        for site in _sites(other):
            places.setdefault(site, _place(envoy, other, site))
    if short in places:
        return f"{where} has no {name!r}: that is {places[short]}"
    if name.isdecimal():
        return f"{where} has {len(envoy._child_map)} modules, and no [{name}]"
    if near := difflib.get_close_matches(short, places, 1, nearness):
        return f"{where} has no {name!r}: is {places[near[0]]} meant?"
    return None


def _at_its_owner(envoy: Envoy, name: str) -> str:
    """Where the site of that name is."""
    for other in _relatives(envoy):
        if name in _sites(other):
            return f"; the site {name!r} is {_place(envoy, other, name)}"
    return ""


def _relatives(envoy: Envoy) -> Iterator[Envoy]:
    """The envoys above, from the nearest on, and those below."""
    other = envoy.parent
    while other is not None:
        yield other
        other = other.parent
    yield from envoy.modules(lambda below: below is not envoy)


def _sites(envoy: Envoy) -> list[str]:
    """The names that an envoy's class serves and not every envoy does."""
    found: dict[str, None] = {}
    for cls in type(envoy).__mro__:
        if cls is not Envoy and issubclass(cls, Envoy):
            found |= {
                name: None
                for name, value in vars(cls).items()
                if isinstance(value, property) and (value.fset is not None or type(value) is not property)
            }
    return [name for name in found if not hasattr(Envoy, name) or name == "skip"]


def _declared(envoy: Envoy) -> list[str]:
    """The attributes that an envoy's class declares, whether they are there or not."""
    return [name for cls in type(envoy).__mro__ for name in getattr(cls, "__annotations__", ())]


def _place(envoy: Envoy, other: Envoy, name: str) -> str:
    """How a name of another envoy is written; whichever layer it is of, where the envoy is above the layers."""
    if other.path.startswith(f"{envoy.path}."):
        return f"{_spelled(envoy.path)}{re.sub(r'[.][0-9]+', '[i]', other.path[len(envoy.path) :])}.{name}"
    return f"{_spelled(other.path)}.{name}"


def _spelled(path: str) -> str:
    """A path as Python has it: ``model.backbone.layers[1].mixer``."""
    return re.sub(r"[.]([0-9]+)", r"[\1]", path)
