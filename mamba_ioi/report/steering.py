"""What Figure 9 says: are names linear in the bottleneck's SSM, so that they can be written there (Section 4.3)."""

from __future__ import annotations

from typing import Any

from .evidence import Finding, Number, Results, Setting, listed, plural, shown

STEERED, HALF = 0.95, 0.5
BEFORE, AFTER = (1, 2, 3), (4, 5)
BLOCKS = {
    "within slots 1 to 3": (BEFORE, BEFORE),
    "within slots 4 and 5": (AFTER, AFTER),
    "from slots 4 and 5 into 1 to 3": (AFTER, BEFORE),
    "from slots 1 to 3 into 4 and 5": (BEFORE, AFTER),
}
METHODS = {"subtract_add": "subtract and add", "replace": "replace"}


def steering(results: Results, setting: Setting) -> Finding:
    """Figure 9: how often a name written into the SSM wins."""
    result = results["fig9"]
    table = result.table
    known = (setting.paper or {}).get("fig9", {})

    def cells_of(method: str, block: str):
        sources, targets = BLOCKS[block]
        here = (table["method"] == method) & table["source_slot"].isin(sources) & table["target_slot"].isin(targets)
        return table[here & (table["n"] > 0)]

    def theirs(method: str, source: int, target: int) -> float | None:
        return known[method][target - 1][source - 1] if method in known else None

    def cell(row: Any) -> Number:
        return Number(
            f"{METHODS.get(row.method, row.method)}, slot {row.source_slot}'s mean into slot {row.target_slot}",
            row.success,
            row.low,
            row.high,
            int(row.n),
            theirs(row.method, int(row.source_slot), int(row.target_slot)),
        )

    blocks: dict[tuple[str, str], Number] = {}
    for method, name in METHODS.items():
        for block, (sources, targets) in BLOCKS.items():
            cells = cells_of(method, block)
            n = int(cells["n"].sum())
            mean = (cells["success"] * cells["n"]).sum() / n if n else float("nan")
            papers = [theirs(method, source, target) for source in sources for target in targets]
            given = [paper for paper in papers if paper is not None]
            paper_mean = sum(given) / len(given) if given else None
            what = f"{name}, {block} (mean of {plural(len(cells), 'cell')})"
            blocks[method, block] = Number(what, mean, n=n, paper=paper_mean)
    main, *others = [blocks["subtract_add", block] for block in BLOCKS]
    inner = cells_of("subtract_add", "within slots 1 to 3")["success"]
    if not main.n:
        return Finding("fig9", None, "No test within slots 1 to 3 has names with means: more pairs are needed.")
    beyond = ", ".join(f"{number.text} {block}" for number, block in zip(others, list(BLOCKS)[1:], strict=True))
    layer, offset = (result.meta["arguments"][name] for name in ("layer", "offset"))
    sentence = (
        f"Subtracting a name's mean {offset:+d} from its token in layer {layer}'s SSM and adding another's makes that "
        f"one win in {main.text} of the tests within slots 1 to 3 ({shown(inner.min())} to {shown(inner.max())} by "
        f"cell); replacing, in {blocks['replace', 'within slots 1 to 3'].text}. Subtract and add has {beyond}."
    )
    holds = bool(main.value >= STEERED)
    if not holds:
        weak = main.value < HALF
        sentence += " Steering at that one position is weak." if weak else f" That is less than {STEERED}."
    if known:
        sentence += f" The paper's numbers for replacing are read off its picture, ±{known['replace_precision']}."
    every = tuple(map(cell, table.itertuples()))
    rule = f"subtract and add wins in at least {STEERED} of the tests within slots 1 to 3"
    return Finding("fig9", holds, sentence, rule, tuple(blocks.values()), every)


def plane(results: Results, setting: Setting) -> Finding:
    """Figure 9's means in a plane; it decides nothing."""
    result = results["fig9_pca"]
    shares = [float(share) for share in result.meta["explained_variance"]]
    sentence = (
        f"Of the mean activations of {plural(result.table['name'].nunique(), 'name')} in five slots, the first "
        f"principal components hold {listed([shown(share) for share in shares])} of the variance."
    )
    numbers = tuple(Number(f"share of variance, component {k}", share) for k, share in enumerate(shares, 1))
    return Finding("fig9_pca", None, sentence, numbers=numbers)


def across_slots(results: Results, setting: Setting) -> Finding:
    """Figure 9 again: does it matter from which of the first three slots a name's mean is taken? It decides nothing."""
    table = results["fig9"].table
    inner = table[table["source_slot"].isin(BEFORE) & table["target_slot"].isin(BEFORE) & (table["n"] > 0)]
    numbers = []
    for method, name in METHODS.items():
        for own, where in ((True, "its own slot"), (False, "another of the first three slots")):
            rows = inner[(inner["method"] == method) & ((inner["source_slot"] == inner["target_slot"]) == own)]
            n = int(rows["n"].sum())
            mean = float((rows["success"] * rows["n"]).sum() / n) if n else float("nan")
            numbers.append(Number(f"{name}, a mean from {where}", mean, n=n))
    same, other = numbers[:2]
    if not same.n or not other.n:
        return Finding("fig9", None, "No test within slots 1 to 3 has names with means: more pairs are needed.")
    sentence = (
        f"A name that is written in by the mean of the slot it is written into wins in {same.text} of the tests, by "
        f"that of another of the first three slots in {other.text}."
    )
    return Finding("fig9", None, sentence, numbers=tuple(numbers))
