"""Figure 12: inside the selective SSM of one Mamba layer, with its hook points at their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.diagram import Box, Diagram, ModelSizes
from mamba_ioi.figures.style import paper_style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

INPUT, A, DELTA, B, C = 1.3, 3.7, 6.3, 8.9, 11.1
SCAN = (A + B) / 2
KINDS = {"learned": "learned weights", "fixed": "no weights", "ssm": "scan over positions"}


@paper_style()
def ssm_internals(sizes: ModelSizes | Mapping[str, int], *, model: str | None = None) -> Figure:
    """From `ssm_input` (top left) to `after_skip` (bottom): the selection of Δ, B and C, the scan, the gate.

    Args:
        sizes: of the model that is shown.
        model: its name, for the title.
    """
    sizes = ModelSizes.of(sizes)
    heads = sizes.n_heads is not None
    page = Diagram(
        12.4, 10.95 if heads else 10.35, f"The selective SSM of a Mamba{'-2' * heads} layer and its hook points", model
    )
    split, step = (_projected if heads else _selected)(page, sizes)
    _discretized(page, sizes, split, step)
    _scan(page, heads)
    page.paragraph(0.5, 8.75, sizes.inner_lines)
    page.key(*(0.5, 9.9) if heads else (2.6, 8.95), KINDS)
    return page.figure


def of_result(result: Result) -> Figure:
    """The diagram of a result with columns size and value, as of `ModelSizes.table`."""
    return ssm_internals(ModelSizes.of_result(result), model=result.meta.get("model"))


def _selected(page: Diagram, sizes: ModelSizes) -> tuple[Box, Box]:
    """In a Mamba the input selects Δ, B and C: where B and C come from, and what the time step has gone through."""
    page.text(INPUT, 0.8, "from conv1d and SiLU")
    page.line((INPUT, 0.93), (INPUT, 6.4))
    page.hook(INPUT, 1.15, "ssm_input", "[B, L, E]")
    page.junction(INPUT, 1.5)
    rank, state = sizes.dt_rank or 0, sizes.d_state
    text = f"x_proj: Linear  E → R + 2N  ({sizes.d_inner} → {rank + 2 * state})"
    projection = page.box((DELTA + C) / 2, 2.05, text, width=C - DELTA + 2.1)
    page.arrow((INPUT, 1.5), (projection.x, 1.5), (projection.x, projection.top))

    step = page.box(DELTA, 3.0, "dt_proj: Linear  R → E, bias", width=2.4)
    page.arrow((DELTA, projection.bottom), (DELTA, step.top))
    page.hook(DELTA, 2.5, "delta_1", "[B, L, R]")
    softplus = page.box(DELTA, 3.95, "softplus", kind="fixed", width=1.2)
    page.arrow((DELTA, step.bottom), (DELTA, softplus.top))
    return projection, softplus


def _projected(page: Diagram, sizes: ModelSizes) -> tuple[Box, Box]:
    """In a Mamba-2 B and C come out of the conv beside x, the time step out of in_proj: likewise."""
    shared, inner = sizes.n_channels - sizes.d_inner, sizes.d_inner
    page.text((INPUT + C) / 2, 0.8, "from conv1d and SiLU [B, L, X]")
    text = f"x, B and C: split  X → E + GN + GN  ({sizes.n_channels} → {inner} + {shared // 2} + {shared // 2})"
    split = page.box((INPUT + C) / 2, 1.35, text, kind="fixed", width=C - INPUT + 1)
    page.arrow((split.x, 0.93), (split.x, split.top))
    page.line((INPUT, split.bottom), (INPUT, 6.4))
    page.hook(INPUT, 1.9, "ssm_input", "[B, L, E]")
    page.text(DELTA, 2.3, "time step, from in_proj [B, L, H]")
    bias = page.box(DELTA, 3.0, "+ parameter dt_bias [H]", width=2.4)
    page.arrow((DELTA, 2.43), (DELTA, bias.top))
    softplus = page.box(DELTA, 3.95, "softplus, clamp", kind="fixed", width=1.5)
    page.arrow((DELTA, bias.bottom), (DELTA, softplus.top))
    return split, softplus


def _discretized(page: Diagram, sizes: ModelSizes, projection: Box, softplus: Box) -> None:
    """From Δ, A and B to the scan, of each channel or of each head."""
    step, decays, gains, group = ("E", "E, N", "E, N", "") if sizes.n_heads is None else ("H", "H", "H, N", "G, ")
    page.hook(DELTA, 3.45, "delta_2", f"[B, L, {step}]")

    log = page.box(A, 3.0, "parameter A_log", width=1.6)
    negative = page.box(A, 3.95, "−exp", kind="fixed", width=1.2)
    page.arrow((A, log.bottom), (A, negative.top))

    decay = page.box(A, 5.35, r"$\bar{A} = \exp(\Delta A)$", kind="fixed", width=1.8, height=0.45)
    gain = page.box(B, 5.35, r"$\bar{B} = \Delta B$", kind="fixed", width=1.8, height=0.45)
    page.arrow((A, negative.bottom), (A, decay.top))
    page.hook(A, 4.4, "A", f"[{decays}]", "left")
    page.arrow((B, projection.bottom), (B, gain.top))
    page.hook(B, 2.5, "B", f"[B, L, {group}N]")
    page.line((DELTA, softplus.bottom), (DELTA, 4.8))
    page.hook(DELTA, 4.4, "delta", f"[B, L, {step}]")
    page.junction(DELTA, 4.8)
    page.arrow((DELTA, 4.8), (A + 0.6, 4.8), (A + 0.6, decay.top))
    page.arrow((DELTA, 4.8), (B - 0.6, 4.8), (B - 0.6, gain.top))

    text = r"$h_t = \bar{A}_t\, h_{t-1} + \bar{B}_t\, x_t$      with $h = 0$ before the first position"
    scan = page.box(SCAN, 6.4, text, kind="ssm", width=B - A + 2, height=0.5)
    page.arrow((A, decay.bottom), (A, scan.top))
    page.hook(A, 5.83, "A_bar", f"[B, L, {decays}]")
    page.arrow((B, gain.bottom), (B, scan.top))
    page.hook(B, 5.83, "B_bar", f"[B, L, {gains}]")
    page.junction(INPUT, 6.4)
    page.arrow((INPUT, 6.4), (scan.left, 6.4))
    page.text((INPUT + scan.left) / 2, 6.27, "x", color="#505050")
    page.hook(C, 2.5, "C", f"[B, L, {group}N]")
    page.line((C, projection.bottom), (C, 7.3))


def _scan(page: Diagram, heads: bool) -> None:
    """From the states to the layer's gated output, which a Mamba-2 norms."""
    read = page.box(SCAN, 7.3, r"$y_t = h_t\, C_t$   (sum over N)", kind="fixed", width=2.4)
    page.arrow((SCAN, 6.65), (SCAN, read.top))
    page.hook(SCAN, 6.88, "h", "[B, L, H, P, N]" if heads else "[B, L, E, N]")
    page.arrow((C, 7.3), (read.right, 7.3))

    total = page.operator(SCAN, 8.15, "+")
    page.arrow((SCAN, read.bottom), (SCAN, total.top))
    page.hook(SCAN, 7.74, "y", "[B, L, E]")
    direct = page.box(A, 8.15, f"× parameter D [{'H' if heads else 'E'}]", width=1.7)
    page.arrow((INPUT, 6.4), (INPUT, 8.15), (direct.left, 8.15))
    page.arrow((direct.right, 8.15), (total.left, 8.15))

    product = page.operator(SCAN, 9.05, "×")
    page.arrow((SCAN, total.bottom), (SCAN, product.top))
    page.hook(SCAN, 8.58, "ssm_output", "[B, L, E]")
    gate = page.box(B, 9.05, "SiLU", kind="fixed", width=1)
    page.arrow((gate.left, 9.05), (product.right, 9.05))
    page.text(11.6, 9.05, "from in_proj", ha="center")
    page.arrow((11.1, 9.05), (gate.right, 9.05))
    page.hook(10.25, 9.05, "skip", "[B, L, E]", "around")
    low = 0.0
    if heads:
        norm, low = page.box(SCAN, 9.65, "RMSNorm"), 0.6
        page.arrow((SCAN, product.bottom), (SCAN, norm.top))
        product = norm
    page.arrow((SCAN, product.bottom), (SCAN, 9.95 + low))
    page.hook(SCAN, 9.5 + low, "after_skip", "[B, L, E]")
    page.text(SCAN, 10.08 + low, "to out_proj")
