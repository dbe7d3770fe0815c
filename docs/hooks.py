"""What mkdocs puts into pages from the code: tables of sites, in place of ``{{ sites }}`` and ``{{ ssd sites }}``."""

from __future__ import annotations

from collections.abc import Mapping

from mamba_ioi.families.mamba2 import FAMILY as MAMBA2
from mamba_ioi.trace.sites import SITES, SiteInfo


def sites_table(sites: Mapping[str, SiteInfo]) -> str:
    """The table of sites in Markdown, in execution order."""
    lines = ["| site | in a trace | shape | what it is |", "|---|---|---|---|"]
    for name, site in sites.items():
        shape = ", ".join(site.shape)
        lines.append(f"| `{name}` | `{site.owner}.{site.attribute}` | [{shape}] | {site.description} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Called by mkdocs for each page."""
    inner = {name: site for name, site in MAMBA2.infos.items() if site != SITES.get(name)}
    return markdown.replace("{{ sites }}", sites_table(SITES)).replace("{{ ssd sites }}", sites_table(inner))
