"""Reading checkpoints, wholly or not at all: transformers' layout and the original state-spaces one."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from ..checks import whole_number
from .weights import (
    hf_name,
    one_line,
    refuse_keys,
    refuse_other_values,
    refuse_shape,
    tensors,
    weight_files,
    widest_dtype,
)

logger = logging.getLogger(__name__)

ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"
_ORIGINAL_KEYS = (
    "backbone.embeddings.weight",
    *(f"backbone.layers.0.mixer.{name}" for name in ("A_log", "conv1d.weight", "dt_proj.weight")),
)


def read_checkpoint(source: str, revision: str | None, dtype: torch.dtype | None) -> tuple[nn.Module, object]:
    """The transformers model and its tokenizer (None if it has none).

    Every tensor in the files is the model's, value for value, in the precision that is asked for, or where none is, in
    one that holds them all.

    Raises:
        ValueError: naming the first tensor for which that cannot be.
    """
    config = read_config(source, revision)
    original = "d_model" in config and "n_layer" in config and "model_type" not in config
    load = _load_original if original else _load_transformers
    try:
        module = load(source, revision, config, dtype)
    except Exception as error:
        raise ValueError(f"{source} could not be loaded as a causal language model: {one_line(error)}") from error
    return module, read_tokenizer(source, revision, original)


def _load_transformers(source: str, revision: str | None, found: dict, dtype: torch.dtype | None) -> nn.Module:
    """A checkpoint that transformers reads, refused where a weight is missing, left over, of another shape or value."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if config.architectures and cls not in config.architectures:
        raise ValueError(f"it is a {', '.join(config.architectures)}, of the type {config.model_type}")
    files = weight_files(source, revision, found.get("transformers_weights"))
    packed = "quantization_config" in found  # its tensors are no values of the model's
    if not packed:
        said = getattr(config, "dtype", None)
        dtype = dtype or widest_dtype(files, said if isinstance(said, torch.dtype) else None)
    module, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        source, revision=revision, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    for key, shape, wanted in info["mismatched_keys"]:
        refuse_shape(key, shape, wanted)
    refuse_keys(info["missing_keys"], info["unexpected_keys"])
    for message in info["error_msgs"]:
        raise ValueError(message)
    if not packed:
        refuse_other_values(module, files)
        _note_untied(module, source)
    return module


def _note_untied(module: PreTrainedModel, source: str) -> None:
    """Let the config say so where it ties the embedding and the head, and the weights hold two different ones."""
    config, head = module.config, module.get_output_embeddings()
    embedding = module.get_input_embeddings()
    if getattr(config, "tie_word_embeddings", False) and head is not None and head.weight is not embedding.weight:
        logger.warning("the config of %s ties the head to the embedding, but its weights hold two: loaded so", source)
        config.tie_word_embeddings = False


def read_config(source: str, revision: str | None) -> dict:
    """The checkpoint\'s config.json.

    Raises:
        ValueError: if there is none to be had, or it is no JSON object.
    """
    try:
        path = cached_file(source, "config.json", revision=revision)
        if path is None:
            raise OSError("it has no config.json")
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is neither a packaged model (such as tiny or planted), nor a directory with a readable "
            f"config.json, nor a Hub id that can be reached from here: {one_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"the config.json of {source} holds a {type(config).__name__}, not an object")
    return config


def _load_original(source: str, revision: str | None, config: dict, dtype: torch.dtype | None) -> MambaForCausalLM:
    """Convert the original state-spaces layout: config with d_model and n_layer, weights with ``embedding``."""
    ssm = config.get("ssm_cfg") or {}
    _refuse_other_blocks(config, ssm)
    files = weight_files(source, revision)
    if not files:
        raise ValueError("it has neither model.safetensors nor pytorch_model.bin, nor an index of several such files")
    state = {hf_name(key): tensor for key, tensor in tensors(files)}
    refuse_keys([key.replace("embeddings.", "embedding.") for key in _ORIGINAL_KEYS if key not in state], ())
    head = state.get("lm_head.weight")
    same = head is None or torch.equal(head, state["backbone.embeddings.weight"])
    tied = same and config.get("tie_embeddings", True)
    module = MambaForCausalLM(_original_config(config, ssm, state, tied))
    module.to(dtype or widest_dtype(files))  # pyright: ignore[reportArgumentType]
    wanted = module.state_dict()
    if tied:
        wanted.pop("lm_head.weight")
        state.pop("lm_head.weight", None)
    refuse_keys(wanted.keys() - state.keys(), state.keys() - wanted.keys())
    for key, tensor in state.items():
        refuse_shape(key, tensor.shape, wanted[key].shape)
        with torch.no_grad():
            wanted[key].copy_(tensor)
    refuse_other_values(module, files)
    if config.get("tie_embeddings") and not tied:
        logger.warning("the config of %s ties the head to the embedding, but its weights hold two: loaded so", source)
    return module


def _refuse_other_blocks(config: dict, ssm: dict) -> None:
    """Refuse an original config that asks for what transformers' Mamba does not have."""
    asked = {
        f"{ssm.get('layer')} layers": ssm.get("layer", "Mamba1") != "Mamba1",
        "attention layers": config.get("attn_layer_idx"),
        "MLPs (d_intermediate)": config.get("d_intermediate"),
        "LayerNorm (rms_norm false)": not config.get("rms_norm", True),
    }
    if wrong := [what for what, is_asked in asked.items() if is_asked]:
        raise ValueError(f"its config asks for {wrong[0]}; only Mamba1 layers with RMSNorm are converted")


def _original_config(config: dict, ssm: dict, state: Mapping[str, Tensor], tied: bool) -> MambaConfig:
    """The config of transformers' Mamba: sizes that the original one does not say are those of most layers' weights."""

    def size(name: str, axis: int, dims: int) -> int:
        shapes = [tensor.shape for key, tensor in state.items() if key.endswith(f".mixer.{name}")]
        sizes = Counter(shape[axis] for shape in shapes if len(shape) == dims)
        if not sizes:
            raise ValueError(f"backbone.layers.0.mixer.{name} has the shape {tuple(shapes[0])}, and not {dims} axes")
        return sizes.most_common(1)[0][0]

    d_model, n_layers = (whole_number(config[name], name, least=1) for name in ("d_model", "n_layer"))
    expand = ssm.get("expand", size("A_log", 0, 2) / d_model)
    if expand != int(expand):
        raise ValueError(f"its layers are {expand:g} times as wide as its d_model; only whole multiples are converted")
    rank = ssm.get("dt_rank", "auto")
    embedding = state["backbone.embeddings.weight"].shape
    return MambaConfig(
        vocab_size=_original_vocab(config, embedding),
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        state_size=ssm.get("d_state", size("A_log", 1, 2)),
        expand=int(expand),
        conv_kernel=ssm.get("d_conv", size("conv1d.weight", 2, 3)),
        time_step_rank=size("dt_proj.weight", 1, 2) if rank == "auto" else rank,
        residual_in_fp32=config.get("residual_in_fp32", True),
        layer_norm_epsilon=1e-5,
        use_conv_bias=ssm.get("conv_bias", any(key.endswith(".conv1d.bias") for key in state)),
        use_bias=ssm.get("bias", any(key.endswith(".in_proj.bias") for key in state)),
        tie_word_embeddings=tied,
    )


def _original_vocab(config: dict, embedding: torch.Size) -> int:
    """The rows of the embedding: those of the config, or some more, as the original code pads them."""
    if "vocab_size" not in config:
        return embedding[0]
    vocab, multiple = config["vocab_size"], config.get("pad_vocab_size_multiple", 8)
    padded = -(-vocab // multiple) * multiple
    return embedding[0] if vocab <= embedding[0] <= padded else padded


def read_tokenizer(source: str, revision: str | None, original: bool):
    """The tokenizer beside the weights; for the original layout, which has none, GPT-NeoX's; None if there is none.

    One that is there and cannot be read is none as well, and a warning says why.
    """
    try:
        tokenizer, unreadable = _tokenizer(source, revision=revision), False
    except Exception as error:
        tokenizer, unreadable = None, _has_tokenizer(source, revision)
        if unreadable:
            logger.warning("the tokenizer of %s cannot be read, and is left out: %s", source, one_line(error))
    if tokenizer is None and original and not unreadable:
        with suppress(Exception):  # a local folder is no reason to go to the network
            tokenizer = _tokenizer(ORIGINAL_TOKENIZER, local_files_only=os.path.isdir(source))
    return tokenizer


def _tokenizer(source: str, **where):
    """The tokenizer at a place, or None if transformers makes one of no words."""
    reader = PreTrainedTokenizerFast if _is_plain(source) else AutoTokenizer
    tokenizer = reader.from_pretrained(source, **where)
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def _is_plain(source: str) -> bool:
    """Whether a folder's tokenizer is its file alone, of which `AutoTokenizer` makes a model type's own."""
    with suppress(OSError, ValueError, AttributeError):
        told = json.loads((Path(source) / "tokenizer_config.json").read_text(encoding="utf-8"))
        return told.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return False


def _has_tokenizer(source: str, revision: str | None) -> bool:
    """Whether there are files of a tokenizer."""
    with suppress(Exception):
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        lenient = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        return any(cached_file(source, name, **lenient) is not None for name in names)
    return False


def empty_tokenizer():
    """A tokenizer that knows nothing, for a model that came without one (nnsight's pipeline needs one)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))


def refuse_missing(source: str) -> None:
    """Refuse what looks like a folder and is none, before anything goes to the network.

    Raises:
        ValueError: if it is a file, or a path to nothing.
    """
    looks_local = source.startswith((".", os.sep)) or source.count("/") > 1 or (os.sep != "/" and os.sep in source)
    if os.path.isfile(source):
        raise ValueError(f"{source} is a file; a model is a directory with config.json and weights")
    if not os.path.isdir(source) and (looks_local or not source):
        raise ValueError(f"there is no directory {source!r}")
