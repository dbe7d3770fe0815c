"""Dictionaries of features: those that ship with the package, and any folder that sae-lens wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checks import whole_number
from . import DICTIONARIES

_HERE = Path(__file__).parent

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_PLAIN = {"normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False}


def load_dictionary(name: str | os.PathLike[str]) -> Any:
    """A dictionary of features: a packaged one, such as ``"tiny/ssm_input"``, or a folder in sae-lens's format.

    Args:
        name: a model that ships with one and the site, or the folder.

    Returns:
        What `Splice`, `feature_effects` and their like take. Dictionaries of the architectures ``standard`` and
        ``topk`` are read here (`SparseAutoencoder`), all others by sae-lens.

    Raises:
        ValueError: if there is no such dictionary, a file of it is damaged, or sae-lens is needed and not installed.
    """
    folder = _folder(name)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["architecture"] not in ("standard", "topk") or any(
            config.get(one, _PLAIN[one]) != _PLAIN[one] for one in _PLAIN
        ):
            return _by_sae_lens(folder, config["architecture"])
        return SparseAutoencoder(config, load_file(folder / WEIGHTS))
    except (OSError, LookupError, TypeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} holds no dictionary in sae-lens's format: {type(error).__name__}: {error}"
        ) from None


def _folder(name: str | os.PathLike[str]) -> Path:
    model, _, site = str(name).partition("/")
    if site in DICTIONARIES.get(model, ()):
        return _HERE / f"{model}_features" / site
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        packaged = ", ".join(f"{model}/{site}" for model, sites in DICTIONARIES.items() for site in sites)
        raise ValueError(
            f"there is no folder {str(name)!r}; the dictionaries that ship with the package are {packaged}"
        )
    return folder


def _by_sae_lens(folder: Path, architecture: str) -> Any:
    try:
        from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{folder} holds a dictionary of the kind {architecture!r}, which sae-lens reads: "
            "pip install 'mamba-ioi[sae]'"
        ) from None
    return SAE.load_from_disk(folder)


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder: features are a ReLU of a linear map, of which the k largest are kept (arXiv 2406.04093).

    Attributes:
        k: how many features are kept at a position; None for all.
        place: the site and the layer whose values it encodes, as the file says; None if it does not.
        W_enc: ``[W, F]``.
        b_enc: ``[F]``.
        W_dec: ``[F, W]``, a feature's direction each.
        b_dec: ``[W]``.
    """

    W_enc: Float[Tensor, "W F"]
    b_enc: Float[Tensor, "F"]
    W_dec: Float[Tensor, "F W"]
    b_dec: Float[Tensor, "W"]

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        shapes = {"W_enc": (config["d_in"], config["d_sae"]), "W_dec": (config["d_sae"], config["d_in"])}
        shapes |= {"b_enc": (config["d_sae"],), "b_dec": (config["d_in"],)}
        for name, shape in shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, and not {shape}")
            setattr(self, name, nn.Parameter(weights[name].float(), requires_grad=False))
        topk = config["architecture"] == "topk"
        self.k = whole_number(config["k"], "k", least=1, most=config["d_sae"]) if topk else None
        self.shifts = bool(config.get("apply_b_dec_to_input", True))
        named = (config.get("metadata") or {}).get("hook_name") or ""
        _, _, rest = named.partition("blocks.")
        layer, _, site = rest.partition(".hook_")
        self.place = (site, int(layer)) if site and layer.isdigit() else None

    def encode(self, x: Float[Tensor, "*B W"]) -> Float[Tensor, "*B F"]:
        """The features of a value."""
        found = torch.relu((x - self.b_dec if self.shifts else x) @ self.W_enc + self.b_enc)
        if self.k is None:
            return found
        values, places = found.topk(self.k, dim=-1)
        return torch.zeros_like(found).scatter(-1, places, values)

    def decode(self, features: Float[Tensor, "*B F"]) -> Float[Tensor, "*B W"]:
        """The value that features make."""
        return features @ self.W_dec + self.b_dec
