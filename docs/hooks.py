"""What mkdocs puts into pages from the code: the table of sites, in place of ``{{ sites }}``."""

from __future__ import annotations

from mamba_ioi.trace.sites import SITES


def sites_table() -> str:
    """The table of sites in Markdown, in execution order."""
    lines = ["| site | in a trace | shape | what it is |", "|---|---|---|---|"]
    for name, site in SITES.items():
        shape = ", ".join(site.shape)
        lines.append(f"| `{name}` | `{site.owner}.{site.attribute}` | [{shape}] | {site.description} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace("{{ sites }}", sites_table())
