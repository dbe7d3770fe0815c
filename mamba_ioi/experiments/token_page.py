"""A page to look at: what each token of a prompt reads of those before it, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checks import integers
from ..figures.token_page import token_page as drawn
from ..interventions.token_to_token import Part, hidden_attention, token_contributions
from ..models.model import CausalLM
from .common import check_layers

PARTS: dict[Part, str] = {"scan": "write", "attention": "attn_out"}
"""A site that tells each part."""
CONTRIBUTIONS, WEIGHTS = "contributions to the stream (their length)", "weights, the mean"


def token_page(
    model: CausalLM, prompt: str, *, layers: Sequence[int] | int | None = None, units: Sequence[int] | int | None = None
) -> str:
    """One self-contained HTML page for a prompt: its tokens, a slider over layers, and what a token reads and feeds.

    Of each layer's scan or attention it shows the length of what each token contributes to the residual stream at each
    later one (`token_contributions`), or the weights (`hidden_attention`), as their mean or of single units.

    Args:
        model: a model with scans or attention.
        prompt: the text, as it stands.
        layers: which layers; all if None. Parts that are neither scan nor attention are left out.
        units: channels, of SSD and attention heads, whose own weights are shown too.

    Returns:
        The page's text.

    Raises:
        ValueError: for a prompt without tokens, a layer or unit that is not there, or no layer with a scan or an
            attention.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"the prompt is a text of at least one token, not {prompt!r}")
    chosen = check_layers(model, range(model.n_layers) if layers is None else layers)
    some = [] if units is None else integers(units, "unit")
    ids, _ = model.to_tokens(prompt)
    panels: list[tuple[str, dict[str, np.ndarray]]] = []
    for layer in chosen:
        sites = model.layer_sites(layer)
        for part in PARTS:
            if PARTS[part] not in sites:
                continue
            lengths = token_contributions(model, ids, layer, part=part)[0].norm(dim=-1)
            views = {CONTRIBUTIONS: lengths, WEIGHTS: hidden_attention(model, ids, layer, part=part)[0]}
            if some:
                own = hidden_attention(model, ids, layer, reduce=None, units=some, part=part)[0]
                views |= {f"weights, unit {unit}": one for unit, one in zip(some, own, strict=True)}
            shown = {name: matrix.float().cpu().numpy() for name, matrix in views.items()}
            panels.append((f"{layer}, {part}", shown))
    if not panels:
        raise ValueError(f"layers {chosen} of {model.model_id} have neither a scan nor an attention to look at")
    texts = [model.tokenizer.decode([token]) for token in ids[0].tolist()]
    note = "A scan's source is where it is written: a token read through the conv's tap -1 stands one position before."
    return drawn(f"{model.model_id}: what tokens read", note, texts, panels)
