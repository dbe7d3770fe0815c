"""Figure 2: a Mamba language model, one layer of it opened, with its hook points at their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.diagram import Diagram, ModelSizes
from mamba_ioi.figures.style import paper_style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

STREAM, STEP, CONV, GATE = 1.75, 2.75, 4.9, 8.0
MIDDLE = (CONV + GATE) / 2


@paper_style()
def architecture(sizes: ModelSizes | Mapping[str, int], *, model: str | None = None) -> Figure:
    """The residual stream on the left, layer i on the right, from the tokens (top) to the logits (bottom).

    Args:
        sizes: of the model that is shown.
        model: its name, for the title.
    """
    sizes = ModelSizes.of(sizes)
    family, low = ("Mamba", 0.0) if sizes.n_heads is None else ("Mamba-2", 0.6)
    page = Diagram(10, 11.9 + low, f"A {family} language model and its hook points", model)
    _stream_before(page)
    _block(page, sizes, low)
    _stream_after(page, sizes, 11.4 + low)
    page.paragraph(7.2 if low else 7.6, 0.85, sizes.lines)
    page.key(3.4, 0.85, {"learned": "learned weights", "fixed": "no weights", "ssm": "selective SSM (Figure 12)"})
    return page.figure


def of_result(result: Result) -> Figure:
    """The diagram of a result with columns size and value, as of `ModelSizes.table`."""
    return architecture(ModelSizes.of_result(result), model=result.meta.get("model"))


def _stream_before(page: Diagram) -> None:
    """Tokens, embedding, the layers before layer i."""
    page.text(STREAM, 0.75, "tokens [B, L]")
    embedding = page.box(STREAM, 1.3, "Embedding  V → D")
    page.arrow((STREAM, 0.87), (STREAM, embedding.top))
    before = page.box(STREAM, 2.15, "layers 0 … i−1", kind="plain")
    page.arrow((STREAM, embedding.bottom), (STREAM, before.top))
    page.hook(STREAM, 1.68, "embed", "[B, L, D]", "left")
    page.line((STREAM, before.bottom), (STREAM, 3.2))


def _block(page: Diagram, sizes: ModelSizes, low: float) -> None:
    """Layer i, from the residual stream and back to it; its end is ``low`` inches lower, for a norm after the gate."""
    width, inner, taps = sizes.d_model, sizes.d_inner, sizes.d_conv
    heads, channels = sizes.n_heads, "E" if sizes.n_heads is None else "X"
    page.frame(2.35, 2.75, 9.8, 10.65 + low, "layer i")
    page.hook(STREAM, 2.7, "resid_pre", "[B, L, D]", "left")
    page.junction(STREAM, 3.2)
    norm = page.box(MIDDLE, 3.75, "RMSNorm")
    page.arrow((STREAM, 3.2), (MIDDLE, 3.2), (MIDDLE, norm.top))
    page.hook(4.2, 3.2, "layer_input", "[B, L, D]", "around")
    if heads is None:
        text, centre, wide = f"in_proj: Linear  D → 2E  ({width} → {2 * inner})", MIDDLE, GATE - CONV + 1.7
    else:
        text = f"in_proj: Linear  D → E + X + H  ({width} → {inner + sizes.n_channels + heads})"
        centre, wide = (STEP + GATE + 0.5) / 2, GATE - STEP + 1.1
    projection = page.box(centre, 4.65, text, width=wide)
    page.arrow((MIDDLE, norm.bottom), (MIDDLE, projection.top))
    page.hook(MIDDLE, 4.15, "normalized_input", "[B, L, D]")

    conv = page.box(CONV, 5.55, f"conv1d: {taps} weights a channel", width=2.3)
    page.arrow((CONV, projection.bottom), (CONV, conv.top))
    page.hook(CONV, 5.05, "in_proj", f"[B, L, {channels}]")
    add = page.box(CONV, 6.45, f"sum of {taps} terms + bias", width=2.3)
    page.arrow((CONV, conv.bottom), (CONV, add.top))
    page.hook(CONV, 5.95, "conv_slice", f"[B, L, {channels}, {taps}]")
    silu = page.box(CONV, 7.35, "SiLU", kind="fixed", width=1)
    page.arrow((CONV, add.bottom), (CONV, silu.top))
    page.hook(CONV, 6.85, "conv", f"[B, L, {channels}]")
    ssm = page.box(CONV, 8.3, "selective SSM\nA, Δ, B, C, h, y: Figure 12", kind="ssm", width=2.3, height=0.55)
    page.arrow((CONV, silu.bottom), (CONV, ssm.top))
    if heads is not None:
        page.text(CONV - 0.12, 7.77, "x, B, C", ha="right", color="#505050")
        page.arrow((STEP, projection.bottom), (STEP, ssm.y), (ssm.left, ssm.y))
        page.text(STEP + 0.1, 7.95, "time step\n[B, L, H]", ha="left", color="#505050", fontsize=8)
    page.hook(CONV, 7.77, "ssm_input", "[B, L, E]")

    product = page.operator(CONV, 9.15, "×")
    page.arrow((CONV, ssm.bottom), (CONV, product.top))
    page.hook(CONV, 8.78, "ssm_output", "[B, L, E]")
    gate = page.box(GATE, 7.35, "SiLU", kind="fixed", width=1)
    page.arrow((GATE, projection.bottom), (GATE, gate.top))
    page.hook(GATE, 5.05, "skip", "[B, L, E]")
    page.arrow((GATE, gate.bottom), (GATE, product.y), (product.right, product.y))
    page.text(GATE - 0.12, 8.3, "gate", ha="right", color="#505050")

    out = page.box(CONV, 10.05 + low, f"out_proj: Linear  E → D  ({inner} → {width})", width=3.3)
    if heads is not None:
        norm = page.box(CONV, 9.75, "RMSNorm")
        page.arrow((CONV, product.bottom), (CONV, norm.top))
        product = norm
    page.arrow((CONV, product.bottom), (CONV, out.top))
    page.hook(CONV, 9.57 + low, "after_skip", "[B, L, E]")
    total = page.operator(STREAM, 10.05 + low, "+")
    page.arrow((out.left, out.y), (total.right, out.y))
    page.hook(2.8, out.y, "out_proj", "[B, L, D]", "around")
    page.arrow((STREAM, 3.2), (STREAM, total.top))
    page.text(STREAM - 0.12, 6.45, "residual\nstream", ha="right", color="#505050")
    page.line((STREAM, total.bottom), (STREAM, 11.4 + low))
    page.hook(STREAM, 10.7 + low, "resid_post", "[B, L, D]", "left")


def _stream_after(page: Diagram, sizes: ModelSizes, row: float) -> None:
    """The layers after layer i, the last norm, the logits."""
    after = page.box(3.15, row, f"layers i+1 … {sizes.n_layers - 1}", kind="plain")
    page.arrow((STREAM, row), (after.left, row))
    norm = page.box(5.0, row, "RMSNorm", width=1.1)
    page.arrow((after.right, row), (norm.left, row))
    head = page.box(7.5, row, "lm_head: Linear  D → V", width=1.9)
    page.arrow((norm.right, row), (head.left, row))
    page.hook(5.98, row, "norm", "[B, L, D]", "around")
    page.arrow((head.right, row), (9.75, row))
    page.hook(9.0, row, "logits", "[B, L, V]", "around")
