"""What mkdocs puts into pages from the code: the tables of sites and of families, in place of ``{{ sites }}`` etc."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba_ioi.families.mamba2 import FAMILY as MAMBA2
from mamba_ioi.trace.sites import SITES, SiteInfo


def sites_table(sites: Mapping[str, SiteInfo]) -> str:
    """The table of sites in Markdown, in execution order."""
    lines = ["| site | in a trace | shape | what it is |", "|---|---|---|---|"]
    for name, site in sites.items():
        shape = ", ".join(site.shape)
        lines.append(f"| `{name}` | `{site.owner}.{site.attribute}` | [{shape}] | {site.description} |")
    return "\n".join(lines)


FAMILIES = Path(__file__).parent / "families"
"""What the tests wrote (`tests.conformance`): a file for each version of transformers."""
SAID = {"passed": "✓", "refused": "refused", "failed": "✗"}


def measured_tables() -> list[dict[str, Any]]:
    """What the tests wrote, the oldest version of transformers first."""
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in FAMILIES.glob("*.json")]
    return sorted(tables, key=lambda table: tuple(map(int, table["versions"]["transformers"].split("."))))


def families_table() -> str:
    """Families by what they are held to, in Markdown; what versions of transformers differ in is told apart."""
    tables = measured_tables()
    versions = [table["versions"]["transformers"] for table in tables]
    families, columns = [], []
    for table in tables:
        families += [family for family in table["families"] if family not in families]
        for row in table["families"].values():
            columns += [column for column in row if column not in columns]
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for family in families:
        row = []
        for column in columns:
            cells = [told(table["families"].get(family, {}).get(column, {})) for table in tables]
            same = len(set(cells)) == 1
            row.append(cells[0] if same else "; ".join(f"{v}: {c}" for v, c in zip(versions, cells, strict=True)))
        lines.append(f"| `{family}` | {' | '.join(row)} |")
    packages = "; ".join(
        f"transformers {table['versions']['transformers']} with nnsight {table['versions']['nnsight']} and torch "
        f"{table['versions']['torch']}"
        for table in tables
    )
    return "\n".join([*lines, "", f"Measured under {packages}."])


def told(cell: Mapping[str, int]) -> str:
    """A cell as the page has it: which outcomes, of how many tests each; the number of refusals is of no interest."""
    parts = [SAID[name] if name == "refused" else f"{SAID[name]} {count}" for name, count in cell.items()]
    return ", ".join(parts) or "not tested"


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Called by mkdocs for each page."""
    inner = {name: site for name, site in MAMBA2.infos.items() if site != SITES.get(name)}
    for name, made in (("sites", SITES), ("ssd sites", inner)):
        markdown = markdown.replace(f"{{{{ {name} }}}}", sites_table(made))
    return markdown.replace("{{ families }}", families_table()) if "{{ families }}" in markdown else markdown
