"""Running a model's traces on an NDIF server: what travels, how often it is sent, and what is kept of the answers.

`ask` is the one way from an experiment to a model: a function of the model that holds traces is called here, or runs
on the server as one request (an nnsight session), so that its activations stay there and only what it returns comes
back. This package travels as source with the request; a server needs torch and nnsight, and not this package.

Answers are kept, here as on a server, in a folder where `answers_in` says so, and work that was interrupted goes on
from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import marshal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import httpx
import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor

from ..models.slow_path import judge_slow_path, served_model
from .traffic import Traffic, public_url

logger = logging.getLogger(__name__)

nnsight.register("mamba_ioi")

KEPT_BYTES = 64 * 2**20
"""How many bytes of answers are kept in memory for a call that is made again after a fault; and how large an answer may
be that is stored though it was computed here."""
WORTH_KEEPING = 1.0
"""How many seconds the work behind an answer took, at least, where it is stored though it was computed here."""

Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Served:
    """What a server runs the model in.

    Attributes:
        dtype: of the activations.
        trusted: whether requests run in the server's own process, where weights and gradients are to be had; others
            run in a sandbox without them.
        difference: of the slow path from the model, as `check_slow_path` has it; None if the model is no Mamba.
    """

    dtype: torch.dtype
    trusted: bool
    difference: float | None


class Answers:
    """Answers to requests, by what was asked: kept until the work that they are part of is complete.

    Args:
        folder: where to store each answer as a safetensors file as well; made if absent.
        asked: what they are part of, in values as a JSON file has them; answers to others are not found.
    """

    def __init__(self, folder: Path | None = None, asked: Mapping[str, Any] | None = None) -> None:
        self.folder, self.asked = folder, dict(asked or {})
        self.held: OrderedDict[str, Answer] = OrderedDict()
        self.failed: str | None = None
        """The request that failed last. Until it succeeds, those before it are answered from what is held."""

    def find(self, key: str) -> Answer | None:
        """The answer to a request that was answered before the work was interrupted."""
        if self.folder is not None and (file := self.folder / f"{key}.safetensors").is_file():
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(file)
            except SafetensorError:  # the disk was full, or the machine stopped
                file.unlink()
        return self.held.get(key) if self.failed is not None else None

    def keep(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        if self.failed == key:
            self.failed = None
            self.held.clear()
        if self.folder is not None:
            from safetensors.torch import save

            from ..files import replace_files

            stored = save({name: value.contiguous() for name, value in answer.items()})
            replace_files(self.folder, {f"{key}.safetensors": stored})
            return
        self.held[key] = answer
        while sum(value.nbytes for one in self.held.values() for value in one.values()) > KEPT_BYTES:
            self.held.popitem(last=False)


@dataclass
class Remote:
    """Where a model runs that is not here.

    Attributes:
        target: the server's URL, or True for the one that nnsight is configured for (``NDIF_HOST``).
        traffic: what was sent and received so far.
        answers: what is kept of it.
        served: what the server was found to run, once it was asked.
    """

    target: bool | str
    traffic: Traffic = field(default_factory=Traffic)
    answers: Answers = field(default_factory=Answers)
    served: Served | None = None

    @property
    def host(self) -> str:
        """The server's URL."""
        from nnsight.schema.config import CONFIG

        return self.target if isinstance(self.target, str) else CONFIG.API.HOST

    def __str__(self) -> str:
        return public_url(self.host)


def ask(model: TransformersModel, work: Callable[..., Answer], *arguments: Any, aside: Sequence[Any] = ()) -> Answer:
    """``work(model, *arguments, *aside)``, on the server as one request if the model runs there.

    Args:
        model: the model.
        work: a function at module level: its source travels, with all that it names. It opens traces on the model and
            returns tensors by name.
        arguments: what it is called with; tensors among them travel too.
        aside: what it is called with after these and what the answer does not depend on: how many rows run at once, a
            bar to move, runs to go on from.

    Returns:
        What ``work`` returns; tensors on the CPU if the model is remote.

    Raises:
        ConnectionError: if the server cannot be reached, or the connection is lost for longer than retries last.
        TimeoutError: if the request ran for longer than the server allows.
        ValueError: if the server refuses the request.
    """
    if model.remote is None:
        return _answered_here(model, work, arguments, aside)
    serve(model)
    answers, key = model.remote.answers, digest(key_on_servers(model), model, work, arguments)
    answer = answers.find(key)
    if answer is None:
        try:
            answer = _send(model, work, [*arguments, *aside])
        except TimeoutError:  # will be asked for in parts
            raise
        except BaseException:
            answers.failed = key
            raise
        answers.keep(key, answer)
    return answer


def _answered_here(
    model: TransformersModel, work: Callable[..., Answer], arguments: Sequence[Any], aside: Sequence[Any]
) -> Answer:
    """The answer of the model here: as it is stored, where answers are; else computed, and stored if it is worth it."""
    answers: Answers | None = model.answers
    try:
        key = None if answers is None else digest(repr(sorted(answers.asked.items())), model, work, arguments)
    except TypeError:  # asked for with something that no bytes stand for, such as a user's object
        key = None
    if answers is None or key is None:
        return work(model, *arguments, *aside)
    if (answer := answers.find(key)) is not None:
        return {name: value.to(model.device) for name, value in answer.items()}
    start = time.monotonic()
    answer = work(model, *arguments, *aside)
    size, graphs = sum(value.nbytes for value in answer.values()), any(one.requires_grad for one in answer.values())
    if time.monotonic() - start >= WORTH_KEEPING and size <= KEPT_BYTES and not graphs:
        answers.keep(key, answer)
    return answer


def _send(model: TransformersModel, work: Callable[..., Answer], arguments: Sequence[Any]) -> Answer:
    from nnsight.intervention.backends.remote import RemoteError

    backend = model.remote_backend(quiet=True)
    try:
        with model.session(backend=backend):
            answer = {name: value.detach().cpu() for name, value in work(model, *arguments).items()}
            answer.save()  # pyright: ignore[reportAttributeAccessIssue]
    except RemoteError as error:
        logger.debug("a request failed on the server", exc_info=error)
        raise ValueError(_reason(model, str(error))) from None
    return answer


def _reason(model: TransformersModel, description: str) -> str:
    """Why a request failed on the server, in a sentence; with the versions there, if they are not those here."""
    assert model.remote is not None
    last = ([line for line in description.splitlines() if line.strip()] or ["for no given reason"])[-1].strip()
    if last.startswith("ValueError: "):
        return last.removeprefix("ValueError: ")
    return f"the request failed on {model.remote}: {last}{_other_versions(model.remote)}"


def _other_versions(remote: Remote) -> str:
    from .ndif import compare

    try:
        found = compare(remote.host).critical_mismatches
    except (OSError, ValueError):
        return ""
    return "".join(f"; it has {name} {one['remote']}, here is {one['local']}" for name, one in sorted(found.items()))


def serve(model: TransformersModel) -> Served:
    """What the server runs this model in; it is asked once.

    Raises:
        ValueError: if the slow path does not reproduce the model that the server runs.
        ConnectionError: as `ask`.
    """
    assert model.remote is not None
    if model.remote.served is None:
        found = _send(model, served_model, ())
        differences = {name: float(value) for name, value in found.items() if name.startswith(("hook_", "blocks."))}
        dtype = found["dtype"].dtype
        difference = judge_slow_path(model.model_id, differences, dtype) if differences else None
        model.remote.served = Served(dtype, bool(found["trusted"]), difference)
    return model.remote.served


def key_on_servers(model: TransformersModel) -> str:
    """What servers call the model: its class, Hub id and revision.

    Raises:
        ValueError: if the Hub does not know the model.
        ConnectionError: if the Hub does not answer.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return model.to_model_key()
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(
            f"{model.model_id!r} is no id of a model on the Hub, by which a server knows what to run"
        ) from None
    except (OSError, httpx.HTTPError) as error:
        raise ConnectionError(f"the Hub does not answer for {model.model_id}: {type(error).__name__}") from None


def require_gradients(model: TransformersModel, what: str) -> None:
    """Refuse ``what`` on a server that runs requests in a sandbox.

    Raises:
        ValueError: if the model runs on such a server.
    """
    if model.remote is not None and not serve(model).trusted:
        raise ValueError(
            f"{what} needs gradients, which the sandbox of {model.remote} does not have: use acdc, which needs "
            f"none, or run it where the weights are (load_model without remote)"
        )


@contextmanager
def answers_in(model: TransformersModel, folder: Path, asked: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Store the answers to the requests made inside in a folder, where another process finds them.

    Of a model that runs here, those are stored that took long and are small.

    Args:
        model: the model.
        folder: where to store them.
        asked: what they are part of, as `Answers` has it; it names the model's weights where the model runs here.
    """
    holder, kept = (model, Answers(folder, asked)) if model.remote is None else (model.remote, Answers(folder))
    before, holder.answers = holder.answers, kept
    try:
        yield
    finally:
        holder.answers = before


def digest(name: str, model: TransformersModel, work: Callable, arguments: Sequence[Any]) -> str:
    """What is asked, as a SHA-256: whom, by name, in which precision, the function, its arguments' values."""
    hashed = hashlib.sha256()
    hashed.update(f"{name} {model.dtype} {work.__module__}.{work.__qualname__} ".encode())
    for part in _parts(arguments):
        hashed.update(part)
    return hashed.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes that stand for a value, the same in every process."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    elif dataclasses.is_dataclass(value):
        yield type(value).__name__.encode()
        for one in dataclasses.fields(value):
            yield from _parts(getattr(value, one.name))
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}".encode()
        for key, one in value.items():
            yield from _parts(key)
            yield from _parts(one)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for one in value:
            yield from _parts(one)
    elif isinstance(value, torch.nn.Module):
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        yield from _parts(value.state_dict())
    elif isinstance(value, FunctionType):
        yield marshal.dumps(value.__code__)
        yield from _parts([value.__defaults__, [cell.cell_contents for cell in value.__closure__ or ()]])
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype | slice):
        yield f"{type(value).__name__}:{value!r};".encode()
    else:
        raise TypeError(f"a {type(value).__name__} cannot be part of what is asked of a server")
