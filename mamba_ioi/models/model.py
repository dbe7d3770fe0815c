"""`load_model`: any Mamba (or another causal language model) as an nnsight model whose activations have names."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from nnsight import TransformersModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers import __version__ as TRANSFORMERS

from ..checks import integer, whole_number
from ..families import Family, family_of
from ..trace.anatomy import Anatomy, find_anatomy, short_prompt, stream_differences
from ..trace.blocks import EVERY_SITE, part_differences
from ..trace.served import Served
from ..trace.sites import MODEL_SITES, SITES, ModelSites, SiteInfo, missing_operations
from ..trace.stages import Stages
from ..trace.touched import hooks, refuse_touched
from ..zoo import locate
from .batching import model_input
from .checkpoints import empty_tokenizer, read_checkpoint, read_config, read_tokenizer, refuse_missing
from .slow_path import check_slow_path, slow_path_tolerance
from .weights import DTYPES, dtype_name, one_line

if TYPE_CHECKING:
    from ..remote.requests import Answers, Remote
    from ..zoo.planted import Planted
    from ..zoo.planted_recall import PlantedRecall

OLDEST_TRANSFORMERS = (5, 15)

_version = tuple(int(part) for part in TRANSFORMERS.split(".")[:2])
if _version < OLDEST_TRANSFORMERS:
    raise ImportError(
        f"mamba_ioi needs transformers 5.15 or newer, not {TRANSFORMERS}: older ones do not have the "
        f"operations causal_conv1d_fn and mamba_selective_scan that its sites stand on"
    )


class _Travels:
    """Stands first in what is pickled of a model: nnsight sends a reference in its place, and others are refused."""

    def __init__(self) -> None:
        self._persistent_id = "Interleaver"

    def __reduce__(self):
        raise ValueError(
            "a model is not pickled: save its weights by model._module.save_pretrained(folder), its tokenizer by "
            "model.tokenizer.save_pretrained(folder), and load them by load_model(folder)"
        )


class CausalLM(Served, ModelSites, TransformersModel):
    """Any causal language model: what the experiments that need no Mamba work on (layer removal, residual edges)."""

    _module: Any
    has_scans = False
    """Whether layers hold a selective scan, with the sites inside."""
    all_scans = False
    """Whether a scan's mixer is all that each layer has, so that a state is all that a position leaves behind."""
    remote: Remote | None = None
    """The NDIF server that traces run on; None: they run here."""

    def __init__(self, *args, **kwargs) -> None:
        TransformersModel.__init__(self, *args, **kwargs)
        self._built = True

    def __getstate__(self) -> dict:
        """What travels to a server: there, traces run where the model is. An ordinary pickle is refused."""
        return {"_travels": _Travels()} | TransformersModel.__getstate__(self) | {"remote": None}

    def __deepcopy__(self, memo: dict) -> CausalLM:
        """A model with weights of its own; of a remote one, whose weights are on the server, another client.

        Raises:
            ValueError: if the model carries edits, which name the model that they were written for.
        """
        if self._edits:
            raise ValueError("a model with edits has no copy: call its clear_edits() first, and edit the copy anew")
        if self.remote is not None:
            model = copy.copy(self)
            model.remote = self.remote
        else:
            module, tokenizer = copy.deepcopy((self._module, self.tokenizer), memo)
            model = _trace_module(module, tokenizer)
        model.repo_id, model.revision, model.memory = self.repo_id, self.revision, self.memory
        if hasattr(self, "planted"):
            model.planted = self.planted
        memo[id(self)] = model
        return model

    memory: int | None = None
    """How many bytes an experiment may use, about; None: half of what is free. Results do not depend on it."""
    answers: Answers | None = None
    """Where what was computed of an unfinished work is stored; None: nowhere. See `remote.requests.answers_in`."""

    @property
    def model_id(self) -> str:
        """The Hub id or folder the model came from."""
        return str(self.repo_id)

    anatomy: Anatomy
    """Where the blocks and the unembedding are, and what `check_stream` found."""

    @property
    def family(self) -> str:
        """The config's ``model_type``: ``mamba``, ``falcon_mamba``, ``gpt2`` and so on."""
        return self._module.config.model_type

    @property
    def is_mamba(self) -> bool:
        """`has_scans`, by the name that it had while Mamba was the one family."""
        return self.has_scans

    @property
    def layer_kinds(self) -> list[str]:
        """What each layer is: ``mamba``, ``mamba2``, ``attention``, ``mlp``, ``moe``, or several joined by ``+``."""
        family = family_of(self.family, self._module)
        return [family.kind(layer._module) for layer in self.layers]

    def sites_of(self, layer: int) -> list[str]:
        """The names of the sites that a layer has, in execution order.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        if (index := integer(layer)) is None or not 0 <= index < self.n_layers:
            raise ValueError(f"a layer is an integer from 0 to {self.n_layers - 1}, not {layer!r}")
        names = list(self.layer_sites(index))
        if not self.has_scans and "attn_out" in names:
            check_parts(self)
            names = names if self._parts[index] else ["resid_pre", "resid_post"]
        return names

    def layer_sites(self, layer: int) -> dict[str, SiteInfo]:
        """The table of a layer's sites by name, in execution order, as the family has it."""
        return self._tables[layer]

    def known_sites(self) -> dict[str, SiteInfo]:
        """The sites that some layer, or the model, may have, in execution order."""
        if not self.has_scans:
            return EVERY_SITE
        there = {name for table in {id(table): table for table in self._tables}.values() for name in table}
        infos = family_of(self.family, self._module).infos
        inside = {name: site for name, site in infos.items() if name in there}
        return {"embed": MODEL_SITES["embed"]} | inside | {name: MODEL_SITES[name] for name in ("norm", "logits")}

    def operations(self, layer: int) -> dict[str, type[Stages]]:
        """The operations of a layer's mixer as chains of values, by their first site: where our own replace them."""
        return self.layers[layer].chains

    @property
    def layers(self):
        """The envoy of the list of blocks.

        Raises:
            ValueError: if there is no such list.
        """
        if not self.anatomy.blocks:
            raise ValueError(self.anatomy.broken)
        return self.get(self.anatomy.blocks)

    @property
    def unembedding(self):
        """The envoy of the module that makes logits of the residual stream; what the model does to them comes after."""
        return self.get(self.anatomy.head)

    @property
    def embedding(self):
        """The envoy of the token embeddings."""
        return self.get(self.anatomy.embed)

    @property
    def final_norm(self):
        """The envoy of the norm before the unembedding."""
        return self.get(self.anatomy.norm)

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return self._module.config.get_text_config().num_hidden_layers

    @property
    def d_model(self) -> int:
        """The width D of the residual stream."""
        return self._module.config.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int:
        """How many logits the model has (V)."""
        return self._module.config.get_text_config().vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights; of a remote model, that which the server computes in (it is asked once)."""
        if self.remote is not None:
            from ..remote.requests import serve

            return serve(self).dtype
        return next(self._module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU where there are none, as here for a remote model or in a server's sandbox."""
        device = next(self._module.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def sizes(self) -> dict[str, int]:
        """The sizes by the letters that shapes are written in."""
        return {"D": self.d_model, "V": self.vocab_size}

    def require_site(self, name: str, layer: int | None) -> None:
        """Refuse a site that the model, or that layer of it, does not have.

        Raises:
            ValueError: naming the sites that are there.
        """
        if name in ("resid_pre", "resid_post"):
            return
        if layer is None:
            there = [part for part in ("embed", "norm") if getattr(self.anatomy, part)] + ["logits"]
        else:
            there = self.sites_of(layer)
        if name not in there and name in SITES and not self.has_scans:
            kind = type(self._module).__name__
            raise ValueError(
                f"sites such as {name!r} need a Mamba; {self.model_id} is a {kind}, which has {', '.join(there)}"
            )
        if name not in there:
            where = self.model_id if layer is None else f"layer {layer} of {self.model_id}"
            raise ValueError(f"{where} has no site {name!r}; it has {', '.join(there)}")

    _tables: list[dict[str, SiteInfo]]
    """Each layer's sites; layers of one kind share a table."""
    _parts: list[bool]
    """Once `check_parts` has run, whether each block's parts add up to the residual stream."""

    def require_mamba(self, what: str) -> None:
        """Refuse ``what`` on a model that is no Mamba.

        Raises:
            ValueError: if the model is no Mamba.
        """
        if not self.has_scans:
            raise ValueError(f"{what} need a Mamba; {self.model_id} is a {type(self._module).__name__}")

    def require_stream(self, what: str, *, edges: bool = False) -> None:
        """Refuse ``what`` where runs would be cut, skipped or rearranged in a way that this model does not allow.

        Args:
            what: what is refused, in the plural.
            edges: whether it also gives blocks the residual stream of other prompts, or takes gradients.

        Raises:
            ValueError: if the model carries edits or hooks, or its residual stream is not all that passes from block to
                block (``edges``: and all that a block reads).
        """
        refuse_touched(self, what, gradients=edges)
        check_stream(self)
        if reason := self.anatomy.broken or (self.anatomy.beside if edges else None):
            raise ValueError(f"{what} cannot be measured: {reason}")

    def trace(self, *inputs, fn=None, **kwargs):
        """nnsight's ``trace``, without the generation cache unless ``use_cache=True`` is given.

        ``generate`` and ``pipe`` come here too, as ``fn``: they use the cache as transformers does.
        """
        if fn is None:
            kwargs.setdefault("use_cache", False)
        kwargs.setdefault("remote", self.remote is not None and self.remote.target)
        return TransformersModel.trace(self, *inputs, fn=fn, **kwargs)

    def session(self, *args, **kwargs):
        """nnsight's ``session``: for a remote model, one request for all the traces in it."""
        kwargs.setdefault("remote", self.remote is not None and self.remote.target)
        return TransformersModel.session(self, *args, **kwargs)

    def remote_backend(self, *, quiet: bool = False, host: str | None = None):
        """The backend of one request to the model's server, or to another."""
        from ..remote.ndif import Backend
        from ..remote.requests import Remote, key_on_servers

        remote = self.remote or Remote(True)
        env = self._remoteable_get_env()
        return Backend(key_on_servers(self), host or remote.host, remote.traffic, quiet=quiet, env=env)

    def _remote_backend(self, remote, blocking, job_id, verbose):
        if remote == "local" or not blocking:
            return TransformersModel._remote_backend(self, remote, blocking, job_id, verbose)
        return self.remote_backend(host=remote if isinstance(remote, str) else None)

    def to_tokens(self, tokens: Tensor | str | Sequence[str]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B"] | None]:
        """Token ids on the model's device, and each row's last token if texts were given (else None).

        Texts are tokenized as they stand (no token is added in front) and padded on the right.

        Raises:
            ValueError: for an empty batch, ids outside the vocabulary, or texts without a tokenizer.
        """
        last = None
        if isinstance(tokens, Tensor):
            ids = tokens
        else:
            texts = [tokens] if isinstance(tokens, str) else tokens
            if self.tokenizer is None:
                raise ValueError(f"{self.model_id} has no tokenizer: pass token ids [B, L] instead of text")
            valid = isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)
            rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if valid else []
            if not rows or not all(rows):
                raise ValueError("tokens are a LongTensor [B, L], a text, or a list of texts that are not empty")
            pad = self.tokenizer.pad_token_id or 0
            ids = torch.full((len(rows), max(map(len, rows))), pad)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            last = torch.tensor([len(row) - 1 for row in rows])
        if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
            raise ValueError(f"tokens are integers of shape [B, L], not {ids.dtype} of shape {tuple(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids run from 0 to {self.vocab_size - 1}, not {int(ids.min())} to {int(ids.max())}")
        return ids.to(self.device, torch.long), last

    def _batch(self, invokes: list, fn: Any) -> tuple:
        return model_input(self, invokes, fn)

    def _configure_tokenizer(self) -> None:
        TransformersModel._configure_tokenizer(self)
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "right"

    def _remoteable_class(self) -> type:
        return TransformersModel


class MambaModel(CausalLM):
    """A model of selective scans under nnsight, every activation of `mamba_ioi.sites` readable and writable in a trace.

    That is a `MambaForCausalLM`, or one of another family in `mamba_ioi.families` whose layers hold such scans.
    """

    has_scans = True
    _measures: dict[str, int]
    planted: Planted | PlantedRecall
    """What is true of a model that `planted` or `planted_recall` made."""

    @property
    def d_inner(self) -> int:
        """The width E of the mixers."""
        return self._measures["E"]

    @property
    def d_state(self) -> int:
        """The size N of each channel's state."""
        return self._measures["N"]

    @property
    def dt_rank(self) -> int:
        """The rank R of the time step's projection (S6 alone)."""
        return self._measure("R", "dt_rank")

    @property
    def n_heads(self) -> int:
        """The number H of the mixers' heads (SSD alone)."""
        return self._measure("H", "n_heads")

    @property
    def head_dim(self) -> int:
        """The size P of a mixer's head (SSD alone)."""
        return self._measure("P", "head_dim")

    @property
    def n_groups(self) -> int:
        """The number G of groups of heads that share B and C (SSD alone)."""
        return self._measure("G", "n_groups")

    @property
    def d_channels(self) -> int:
        """The number of the conv's channels: d_inner, or X where B and C pass through the conv as well."""
        return self._measures.get("X", self.d_inner)

    def _measure(self, letter: str, name: str) -> int:
        if letter not in self._measures:
            raise ValueError(f"{self.model_id} is a {self.family}, which has no {name}")
        return self._measures[letter]

    @property
    def d_conv(self) -> int:
        """The number of the conv's taps."""
        return self._measures["K"]

    def dispatch(self) -> None:
        """Load the weights of a model that was built without them, and look into the new mixers' operations."""
        TransformersModel.dispatch(self)
        refuse_other_operations(self)

    def sizes(self) -> dict[str, int]:
        """The sizes by the letters that shapes are written in."""
        return CausalLM.sizes(self) | self._measures


def load_model(
    name: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    remote: bool | str = False,
) -> MambaModel | CausalLM:
    """Load a model for tracing.

    Args:
        name: ``"tiny"`` (a small Mamba trained on the task, packaged), ``"tiny-mamba2"`` (a Mamba-2 likewise),
            ``"planted"`` (a Mamba with a known circuit), a local directory, or a Hub id. The original state-spaces
            layout is converted on the way. Another causal language model (GPT-2, Llama) loads too, without the sites
            of a Mamba.
        device: where to put it; the CPU unless given.
        dtype: precision of the weights, e.g. ``torch.bfloat16`` or ``"float32"``; unless given, the one that the
            checkpoint's config names, or a wider one if it stores its weights in that.
        revision: the Hub revision.
        remote: build the model without weights; its traces, and every experiment, run on the NDIF server that nnsight
            is configured for (True), or on the one with this URL. Precision and place are the server's own.

    Raises:
        ValueError: for a model that is not there, cannot be read, or has another architecture; naming the first tensor
            that is missing, left over, of another shape, not finite, or beyond what ``dtype`` holds; and for a Mamba
            whose slow path does not reproduce the untouched model's logits.
    """
    dtype = _as_dtype(dtype)
    device = _as_device(device)
    if name == "planted":
        model = planted()
        model._module.to(device=device, dtype=dtype)
        return model
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a model is named by a text or a path, not {name!r}")
    source = locate(name)
    refuse_missing(source)
    if remote:
        return _wrap_remote(source, revision, remote)
    module, tokenizer = read_checkpoint(source, revision, dtype)
    module = module.to(device=device).eval()
    return wrap(module, tokenizer, model_id=str(name), revision=revision)


def planted(
    n_layers: int = 6,
    layer: int = 3,
    slice: int = -1,
    n_names: int = 24,
    seed: int = 0,
    *,
    family: str = "mamba",
) -> MambaModel | CausalLM:
    """A Mamba or Mamba-2 that solves the task by a circuit written into its weights: the known answer.

    Args:
        n_layers: how many layers it has.
        layer: the layer that does the task.
        slice: the conv tap through which that layer takes the names: 0, -1, -2 or -3.
        n_names: how many names it knows, drawn by the seed.
        seed: of the names and of the other layers' small, harmless weights.
        family: ``"mamba"`` or ``"mamba2"``.

    Returns:
        The model; its ``planted`` says what is true of it.

    Raises:
        ValueError: for a layer, slice, number of names or family that cannot be built.
    """
    from ..zoo.planted import build_planted, planted_names
    from ..zoo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(planted_names(n_names, seed))
    module, truth = build_planted(
        tokenizer, n_layers=n_layers, layer=layer, slice=slice, n_names=n_names, seed=seed, family=family
    )
    model = wrap(module, tokenizer, model_id="planted" if family == "mamba" else f"planted-{family}")
    model.planted = truth
    return model


def planted_recall(
    n_layers: int = 2, layer: int = 1, slice: int = -1, n_keys: int = 16, seed: int = 0
) -> MambaModel | CausalLM:
    """A Mamba that recalls values by a circuit written into its weights: the known answer of the recall study.

    Args:
        n_layers: how many layers it has.
        layer: the layer that recalls; one is enough.
        slice: the conv tap that binds a key to its value: -1, -2 or -3.
        n_keys: how many keys it knows, and how many values.
        seed: of the other layers' small, harmless weights.

    Returns:
        The model; its ``planted`` says what is true of it (`mamba_ioi.zoo.planted_recall.PlantedRecall`).

    Raises:
        ValueError: for a layer, slice or number of keys that cannot be built.
    """
    from ..zoo.planted_recall import build_planted_recall
    from ..zoo.word_tokenizer import build_tokenizer

    tokenizer = build_tokenizer(whole_number(n_keys, "n_keys", least=2, most=256))
    module, truth = build_planted_recall(tokenizer, n_layers=n_layers, layer=layer, slice=slice, seed=seed)
    model = wrap(module, tokenizer, model_id="planted-recall")
    model.planted = truth
    return model


def wrap(module: nn.Module, tokenizer, *, model_id: str, revision: str | None = None) -> MambaModel | CausalLM:
    """Make an nnsight model of a transformers model in memory, and check it.

    The model may be spread over devices and the disk by a ``device_map``.

    Raises:
        ValueError: if the model is compiled or has no weights; if a Mamba's activation is not silu, its mixers lack an
            operation that the sites stand on, its slow path gives other logits, or its logits do not follow from its
            residual stream. (Of other models, what needs that refuses.)
    """
    _refuse_untraceable(module)
    model = _trace_module(module, tokenizer)
    model.repo_id, model.revision = model_id, revision
    if isinstance(model, MambaModel):
        check_slow_path(model)
    if not any(hooks(model)):
        check_stream(model)
        if model.has_scans and model.anatomy.broken:
            raise ValueError(model.anatomy.broken)
    return model


def _refuse_untraceable(module: nn.Module) -> None:
    """Refuse a module in memory whose forward nnsight cannot look into, or that has no weights.

    Raises:
        ValueError: naming the part and what would be right.
    """
    for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
        forward = vars(part).get("forward")
        if hasattr(part, "_orig_mod") or part._compiled_call_impl or hasattr(forward, "_torchdynamo_orig_callable"):
            what = f"its {name}" if name else "the model"
            raise ValueError(
                f"{what} is compiled by torch.compile, and no trace sees inside: wrap the uncompiled model"
            )
    if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
        raise ValueError(f"a model in memory is a transformers model with a head, not a {type(module).__name__}")
    for name, part in module.named_modules():
        if not hasattr(part, "_hf_hook") and any(own.is_meta for own in part.parameters(recurse=False)):
            raise ValueError(f"the model has no weights: those of its {name or type(module).__name__} are on 'meta'")


def _trace_module(module: nn.Module, tokenizer) -> MambaModel | CausalLM:
    """The nnsight model of a module in memory."""
    config: Any = module.config
    family = family_of(config.model_type, module)
    with _placed(module) as device:
        return _trace(module, tokenizer, family, **device)


@contextmanager
def _placed(module: nn.Module) -> Iterator[dict]:
    """Where nnsight's pipeline shall put the module: where it is, or nowhere if accelerate's hooks move its weights."""
    if not hasattr(module, "_hf_hook") and getattr(module, "hf_device_map", None) is None:
        yield {"device": module.device}
        return
    own = vars(module).get("hf_device_map")
    places = [place for place in (own or {}).values() if place != "disk"]
    module.hf_device_map = {"": places[0] if places else "cpu"}  # pyright: ignore[reportArgumentType]
    try:
        yield {}
    finally:
        if own is None:
            del module.hf_device_map
        else:
            module.hf_device_map = own


def _trace(source: nn.Module | str, tokenizer, family: Family, **kwargs) -> MambaModel | CausalLM:
    """The nnsight model of a module or of a checkpoint that is not loaded yet."""
    kwargs["envoys"] = family.envoys()
    stand_in = empty_tokenizer() if tokenizer is None else tokenizer
    cls = MambaModel if family.has_scans else CausalLM
    model = cls(source, task="text-generation", tokenizer=stand_in, **kwargs)  # pyright: ignore[reportCallIssue]
    model.tokenizer = tokenizer
    model.anatomy = find_anatomy(model._module)[0]
    model._tables = family.tables(model.layers) if model.anatomy.blocks else []
    if isinstance(model, MambaModel):
        model._measures = family.sizes(model._module.config)
        model.all_scans = all(kind in ("mamba", "mamba2") for kind in model.layer_kinds)
        refuse_other_operations(model)
    return model


def refuse_other_operations(model: MambaModel) -> None:
    """Refuse a mixer with another activation, or a transformers whose mixer lacks operations that the sites stand on.

    This looks into every mixer, after which nnsight serves the operations inside. It has to happen before a trace: a
    mixer that is first looked into while it runs would not serve them any more.

    Raises:
        ValueError: naming the activation, or the version and the missing operation.
    """
    mixers = [layer.mixer for layer in model.layers if layer.chains]
    for activation in dict.fromkeys(mixer._module.activation for mixer in mixers):
        if activation not in ("silu", "swish"):
            raise ValueError(
                f"its conv's activation is {activation!r} (hidden_act); mamba_ioi's own conv has silu alone"
            )
    missing = [operation for mixer in mixers for operation in missing_operations(mixer)]
    if missing:
        kind = type(mixers[0]._module).__name__
        raise ValueError(
            f"transformers {TRANSFORMERS} has a {kind} without {' and '.join(dict.fromkeys(missing))}; "
            f"the sites need it: install a release of transformers from 5.15 on that mamba_ioi was tested with"
        )


def check_stream(model: CausalLM) -> None:
    """Find out, once, whether blocks can be left out, given other inputs, and read at some positions alone.

    ``model.anatomy`` says what was found; `CausalLM.require_stream` refuses accordingly.
    """
    from ..remote.requests import ask

    found = []
    for anatomy in [] if model.anatomy.checked else find_anatomy(model._module):
        model.anatomy = anatomy
        try:
            differences = {key: float(value) for key, value in ask(model, stream_differences).items()}
            judged = anatomy.judged(model.model_id, differences, slow_path_tolerance(model.dtype))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # whatever a model does that is not followed
            reason = f"the layers of {model.model_id} could not be followed: {type(error).__name__}: {one_line(error)}"
            judged = replace(anatomy, checked=True, broken=reason)
        found.append(replace(judged, plain=judged.plain and model.has_scans))  # others do not round their logits
        if judged.broken is None:
            break
    if found:
        model.anatomy = next((one for one in found if one.broken is None), found[0])
        model._tables = family_of(model.family, model._module).tables(model.layers) if model.anatomy.blocks else []
        if model.remote is None and model._module.training and (model.anatomy.broken or model.anatomy.beside):
            broken = f"{model.model_id} is in training mode, where two runs are not alike: call model._module.eval()"
            model.anatomy = replace(model.anatomy, checked=False, broken=broken)


def check_parts(model: CausalLM) -> None:
    """Find out, once, in which blocks attention and MLP add up to the residual stream: others lack their sites.

    Raises:
        ValueError: if that cannot be told, since the model carries edits or hooks, or is in training mode.
    """
    if "_parts" in vars(model):
        return
    from ..remote.requests import ask

    refuse_touched(model, "sites of attention and MLP")
    if model.remote is None and model._module.training:
        raise ValueError(f"{model.model_id} is in training mode, where runs differ: call model._module.eval()")
    found, limit = ask(model, part_answer), slow_path_tolerance(model.dtype)
    model._parts = [bool((found.get(f"parts.{i}", torch.zeros(1)) <= limit).all()) for i in range(model.n_layers)]


def part_answer(model) -> dict[str, Tensor]:
    """`part_differences` of a short prompt, here or on a server; infinite where norms stand after their parts."""
    try:
        with torch.no_grad(), model.trace(short_prompt(model, 6)):
            found = part_differences(model).save()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:
        if type(error).__name__ != "OutOfOrderError":
            raise
        return {f"parts.{i}": torch.tensor(torch.inf) for i in range(model.n_layers)}
    return found


def _wrap_remote(source: str, revision: str | None, target: bool | str) -> MambaModel | CausalLM:
    """The model without weights, whose traces run on an NDIF server."""
    from ..remote.requests import Remote

    if isinstance(target, str) and not re.fullmatch(r"https?://[^/\s@]+/?", target):
        raise ValueError(f"remote is True, or the URL of an NDIF server such as http://127.0.0.1:8001, not {target!r}")
    read_config(source, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except Exception as error:
        raise ValueError(f"{source} could not be loaded as a causal language model: {one_line(error)}") from error
    tokenizer = read_tokenizer(source, revision, original=False)
    model = _trace(source, tokenizer, family_of(config.model_type), revision=revision)
    model.remote = Remote(target.rstrip("/") if isinstance(target, str) else True)
    if model.all_scans:  # of which `served_model` tells
        model.anatomy = replace(model.anatomy, tuples=(0,) * model.n_layers, plain=True, checked=True)
    return model


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(map(dtype_name, DTYPES))}")
    return found


def _as_device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device("cpu" if device is None else device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {one_line(error)}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no weights; use remote=True for a model without weights")
    return device
