"""Figure 12: inside the selective SSM of one Mamba layer, with its hook points at their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.diagram import Diagram, ModelSizes
from mamba_ioi.figures.style import paper_style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

INPUT, A, DELTA, B, C = 1.3, 3.7, 6.3, 8.9, 11.1
SCAN = (A + B) / 2


@paper_style()
def ssm_internals(sizes: ModelSizes | Mapping[str, int], *, model: str | None = None) -> Figure:
    """From `ssm_input` (top left) to `after_skip` (bottom): the selection of Δ, B and C, the scan, the gate.

    Args:
        sizes: of the model that is shown.
        model: its name, for the title.
    """
    sizes = ModelSizes.of(sizes)
    page = Diagram(12.4, 10.35, "The selective SSM of a Mamba layer and its hook points", model)
    _selection(page, sizes)
    _scan(page)
    page.paragraph(0.5, 8.75, sizes.lines[2:5] + sizes.lines[-1:])
    page.key(2.6, 8.95, {"learned": "learned weights", "fixed": "no weights", "ssm": "scan over positions"})
    return page.figure


def of_result(result: Result) -> Figure:
    """The diagram of a result with columns size and value, as of `ModelSizes.table`."""
    return ssm_internals(ModelSizes.of_result(result), model=result.meta.get("model"))


def _selection(page: Diagram, sizes: ModelSizes) -> None:
    """From the input to the discrete A and B: what each position selects."""
    page.text(INPUT, 0.8, "from conv1d and SiLU")
    page.line((INPUT, 0.93), (INPUT, 6.4))
    page.hook(INPUT, 1.15, "ssm_input", "[B, L, E]")
    page.junction(INPUT, 1.5)
    rank, state = sizes.dt_rank, sizes.d_state
    text = f"x_proj: Linear  E → R + 2N  ({sizes.d_inner} → {rank + 2 * state})"
    projection = page.box((DELTA + C) / 2, 2.05, text, width=C - DELTA + 2.1)
    page.arrow((INPUT, 1.5), (projection.x, 1.5), (projection.x, projection.top))

    step = page.box(DELTA, 3.0, "dt_proj: Linear  R → E, bias", width=2.4)
    page.arrow((DELTA, projection.bottom), (DELTA, step.top))
    page.hook(DELTA, 2.5, "delta_1", "[B, L, R]")
    softplus = page.box(DELTA, 3.95, "softplus", kind="fixed", width=1.2)
    page.arrow((DELTA, step.bottom), (DELTA, softplus.top))
    page.hook(DELTA, 3.45, "delta_2", "[B, L, E]")

    log = page.box(A, 3.0, "parameter A_log", width=1.6)
    negative = page.box(A, 3.95, "−exp", kind="fixed", width=1.2)
    page.arrow((A, log.bottom), (A, negative.top))

    decay = page.box(A, 5.35, r"$\bar{A} = \exp(\Delta A)$", kind="fixed", width=1.8, height=0.45)
    gain = page.box(B, 5.35, r"$\bar{B} = \Delta B$", kind="fixed", width=1.8, height=0.45)
    page.arrow((A, negative.bottom), (A, decay.top))
    page.hook(A, 4.4, "A", "[E, N]", "left")
    page.arrow((B, projection.bottom), (B, gain.top))
    page.hook(B, 2.5, "B", "[B, L, N]")
    page.line((DELTA, softplus.bottom), (DELTA, 4.8))
    page.hook(DELTA, 4.4, "delta", "[B, L, E]")
    page.junction(DELTA, 4.8)
    page.arrow((DELTA, 4.8), (A + 0.6, 4.8), (A + 0.6, decay.top))
    page.arrow((DELTA, 4.8), (B - 0.6, 4.8), (B - 0.6, gain.top))

    text = r"$h_t = \bar{A}_t\, h_{t-1} + \bar{B}_t\, x_t$      with $h = 0$ before the first position"
    scan = page.box(SCAN, 6.4, text, kind="ssm", width=B - A + 2, height=0.5)
    page.arrow((A, decay.bottom), (A, scan.top))
    page.hook(A, 5.83, "A_bar", "[B, L, E, N]")
    page.arrow((B, gain.bottom), (B, scan.top))
    page.hook(B, 5.83, "B_bar", "[B, L, E, N]")
    page.junction(INPUT, 6.4)
    page.arrow((INPUT, 6.4), (scan.left, 6.4))
    page.text((INPUT + scan.left) / 2, 6.27, "x", color="#505050")
    page.hook(C, 2.5, "C", "[B, L, N]")
    page.line((C, projection.bottom), (C, 7.3))


def _scan(page: Diagram) -> None:
    """From the states to the layer's gated output."""
    read = page.box(SCAN, 7.3, r"$y_t = h_t\, C_t$   (sum over N)", kind="fixed", width=2.4)
    page.arrow((SCAN, 6.65), (SCAN, read.top))
    page.hook(SCAN, 6.88, "h", "[B, L, E, N]")
    page.arrow((C, 7.3), (read.right, 7.3))

    total = page.operator(SCAN, 8.15, "+")
    page.arrow((SCAN, read.bottom), (SCAN, total.top))
    page.hook(SCAN, 7.74, "y", "[B, L, E]")
    direct = page.box(A, 8.15, "× parameter D [E]", width=1.7)
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
    page.arrow((SCAN, product.bottom), (SCAN, 9.95))
    page.hook(SCAN, 9.5, "after_skip", "[B, L, E]")
    page.text(SCAN, 10.08, "to out_proj")
