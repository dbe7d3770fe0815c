"""Figure 2: a Mamba language model, one layer of it opened, with its hook points at their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.diagram import Diagram, ModelSizes
from mamba_ioi.figures.style import paper_style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

STREAM, CONV, GATE = 1.75, 4.9, 8.0
MIDDLE = (CONV + GATE) / 2


@paper_style()
def architecture(sizes: ModelSizes | Mapping[str, int], *, model: str | None = None) -> Figure:
    """The residual stream on the left, layer i on the right, from the tokens (top) to the logits (bottom).

    Args:
        sizes: of the model that is shown.
        model: its name, for the title.
    """
    sizes = ModelSizes.of(sizes)
    page = Diagram(10, 11.9, "A Mamba language model and its hook points", model)
    _stream_before(page)
    _block(page, sizes)
    _stream_after(page, sizes)
    page.paragraph(7.6, 0.85, sizes.lines)
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


def _block(page: Diagram, sizes: ModelSizes) -> None:
    """Layer i, from the residual stream and back to it."""
    width, inner, taps = sizes.d_model, sizes.d_inner, sizes.d_conv
    page.frame(2.35, 2.75, 9.8, 10.65, "layer i")
    page.hook(STREAM, 2.7, "resid_pre", "[B, L, D]", "left")
    page.junction(STREAM, 3.2)
    norm = page.box(MIDDLE, 3.75, "RMSNorm")
    page.arrow((STREAM, 3.2), (MIDDLE, 3.2), (MIDDLE, norm.top))
    page.hook(4.2, 3.2, "layer_input", "[B, L, D]", "around")
    projection = page.box(MIDDLE, 4.65, f"in_proj: Linear  D → 2E  ({width} → {2 * inner})", width=GATE - CONV + 1.7)
    page.arrow((MIDDLE, norm.bottom), (MIDDLE, projection.top))
    page.hook(MIDDLE, 4.15, "normalized_input", "[B, L, D]")

    conv = page.box(CONV, 5.55, f"conv1d: {taps} weights a channel", width=2.3)
    page.arrow((CONV, projection.bottom), (CONV, conv.top))
    page.hook(CONV, 5.05, "in_proj", "[B, L, E]")
    add = page.box(CONV, 6.45, f"sum of {taps} terms + bias", width=2.3)
    page.arrow((CONV, conv.bottom), (CONV, add.top))
    page.hook(CONV, 5.95, "conv_slice", f"[B, L, E, {taps}]")
    silu = page.box(CONV, 7.35, "SiLU", kind="fixed", width=1)
    page.arrow((CONV, add.bottom), (CONV, silu.top))
    page.hook(CONV, 6.85, "conv", "[B, L, E]")
    ssm = page.box(CONV, 8.3, "selective SSM\nA, Δ, B, C, h, y: Figure 12", kind="ssm", width=2.3, height=0.55)
    page.arrow((CONV, silu.bottom), (CONV, ssm.top))
    page.hook(CONV, 7.77, "ssm_input", "[B, L, E]")

    product = page.operator(CONV, 9.15, "×")
    page.arrow((CONV, ssm.bottom), (CONV, product.top))
    page.hook(CONV, 8.78, "ssm_output", "[B, L, E]")
    gate = page.box(GATE, 7.35, "SiLU", kind="fixed", width=1)
    page.arrow((GATE, projection.bottom), (GATE, gate.top))
    page.hook(GATE, 5.05, "skip", "[B, L, E]")
    page.arrow((GATE, gate.bottom), (GATE, product.y), (product.right, product.y))
    page.text(GATE - 0.12, 8.3, "gate", ha="right", color="#505050")

    out = page.box(CONV, 10.05, f"out_proj: Linear  E → D  ({inner} → {width})", width=3.3)
    page.arrow((CONV, product.bottom), (CONV, out.top))
    page.hook(CONV, 9.57, "after_skip", "[B, L, E]")
    total = page.operator(STREAM, 10.05, "+")
    page.arrow((out.left, out.y), (total.right, out.y))
    page.hook(2.8, out.y, "out_proj", "[B, L, D]", "around")
    page.arrow((STREAM, 3.2), (STREAM, total.top))
    page.text(STREAM - 0.12, 6.45, "residual\nstream", ha="right", color="#505050")
    page.line((STREAM, total.bottom), (STREAM, 11.4))
    page.hook(STREAM, 10.7, "resid_post", "[B, L, D]", "left")


def _stream_after(page: Diagram, sizes: ModelSizes) -> None:
    """The layers after layer i, the last norm, the logits."""
    row = 11.4
    after = page.box(3.15, row, f"layers i+1 … {sizes.n_layers - 1}", kind="plain")
    page.arrow((STREAM, row), (after.left, row))
    norm = page.box(5.0, row, "RMSNorm", width=1.1)
    page.arrow((after.right, row), (norm.left, row))
    head = page.box(7.5, row, "lm_head: Linear  D → V", width=1.9)
    page.arrow((norm.right, row), (head.left, row))
    page.hook(5.98, row, "norm", "[B, L, D]", "around")
    page.arrow((head.right, row), (9.75, row))
    page.hook(9.0, row, "logits", "[B, L, V]", "around")
