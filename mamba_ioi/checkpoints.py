"""Reading checkpoints, wholly or not at all: transformers' layout and the original state-spaces one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"
_ORIGINAL_KEYS = (
    "backbone.embedding.weight",
    *(f"backbone.layers.0.mixer.{name}" for name in ("A_log", "conv1d.weight", "dt_proj.weight")),
)


def read_checkpoint(source: str, revision: str | None) -> tuple[nn.Module, object]:
    """The transformers model and its tokenizer (None if it has none)."""
    config = read_config(source, revision)
    original = "d_model" in config and "n_layer" in config and "model_type" not in config
    try:
        module = _load_original(source, revision, config) if original else _load_transformers(source, revision)
    except Exception as error:
        raise ValueError(f"{source} could not be loaded as a causal language model: {one_line(error)}") from error
    return module, read_tokenizer(source, revision, original)


def _load_transformers(source: str, revision: str | None) -> nn.Module:
    """A checkpoint that transformers reads, refused where a weight is missing, left over or of another shape."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if config.architectures and cls not in config.architectures:
        raise ValueError(f"it is a {', '.join(config.architectures)}, of the type {config.model_type}")
    module, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        source, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for key, found, wanted in info["mismatched_keys"]:
        raise ValueError(f"{key} has the shape {tuple(found)}, and its config asks for {tuple(wanted)}")
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {_some(info['missing_keys'])}")
    if info["unexpected_keys"] and isinstance(module, MambaForCausalLM):
        raise ValueError(f"its weights hold {_some(info['unexpected_keys'])}, which its config has no place for")
    return module


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return f"{keys[0]}" if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def read_config(source: str, revision: str | None) -> dict:
    """The checkpoint\'s config.json.

    Raises:
        ValueError: if there is none to be had, or it is no JSON object.
    """
    try:
        path = cached_file(source, "config.json", revision=revision)
        if path is None:
            raise OSError("it has no config.json")
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is neither a packaged model (tiny, planted), nor a directory with a readable config.json, "
            f"nor a Hub id that can be reached from here: {one_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"the config.json of {source} holds a {type(config).__name__}, not an object")
    return config


def _load_original(source: str, revision: str | None, config: dict) -> MambaForCausalLM:
    """Convert the original state-spaces layout: config with d_model and n_layer, weights with ``embedding``."""
    ssm = config.get("ssm_cfg") or {}
    if ssm.get("layer", "Mamba1") != "Mamba1" or config.get("attn_layer_idx"):
        raise ValueError(f"its config asks for {ssm.get('layer', 'attention')} layers; only Mamba1 is converted")
    weights = _original_weights(source, revision)
    lacking = [key for key in _ORIGINAL_KEYS if key not in weights]
    if lacking:
        raise ValueError(f"its weights lack {_some(lacking)}")
    vocab_size = weights["backbone.embedding.weight"].shape[0]
    a_log = weights["backbone.layers.0.mixer.A_log"]
    hf = MambaConfig(
        vocab_size=vocab_size,
        hidden_size=config["d_model"],
        num_hidden_layers=config["n_layer"],
        state_size=a_log.shape[1],
        expand=a_log.shape[0] // config["d_model"],
        conv_kernel=weights["backbone.layers.0.mixer.conv1d.weight"].shape[-1],
        time_step_rank=weights["backbone.layers.0.mixer.dt_proj.weight"].shape[1],
        residual_in_fp32=config.get("residual_in_fp32", True),
        layer_norm_epsilon=1e-5,
        use_conv_bias="backbone.layers.0.mixer.conv1d.bias" in weights,
        use_bias="backbone.layers.0.mixer.in_proj.bias" in weights,
        tie_word_embeddings=config.get("tie_embeddings", True),
    )
    module = MambaForCausalLM(hf)
    state = {key.replace("backbone.embedding.", "backbone.embeddings."): value for key, value in weights.items()}
    if hf.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["backbone.embeddings.weight"])
    module.to(a_log.dtype).load_state_dict(state)  # pyright: ignore[reportArgumentType]
    return module


def _original_weights(source: str, revision: str | None) -> dict[str, Tensor]:
    for filename in ("model.safetensors", "pytorch_model.bin"):
        path = cached_file(source, filename, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        if filename.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError("it has neither model.safetensors nor pytorch_model.bin")


def read_tokenizer(source: str, revision: str | None, original: bool):
    """The tokenizer beside the weights; for the original layout, which has none, GPT-NeoX's; None if there is none."""
    tokenizer = _tokenizer(source, revision=revision)
    if tokenizer is None and original:  # a local folder is no reason to go to the network
        tokenizer = _tokenizer(ORIGINAL_TOKENIZER, local_files_only=os.path.isdir(source))
    return tokenizer


def _tokenizer(source: str, **where):
    """The tokenizer at a place, or None: where its files are missing, transformers may make one of no words."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except Exception:
        return None
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


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


def one_line(error: BaseException) -> str:
    """The first line of an error\'s message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
