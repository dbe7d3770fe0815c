"""Headless Chromium for the pages that the project writes."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=4000 --enable-logging=stderr"
)


def chromium(file: Path, *options: str, fragment: str = "") -> str:
    """Open a file; what Chromium prints. The page must write nothing to the console."""
    profile = file.parent / f"{file.stem}-profile"
    command = [BROWSER, *_OPTIONS.split(), *options, f"--user-data-dir={profile}", f"{file.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def body_data(page: str, folder: Path, *options: str, fragment: str = "") -> dict[str, str]:
    """The ``data-`` attributes that a page's script has put onto its body."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    body = re.search(r"<body[^>]*>", chromium(file, "--dump-dom", *options, fragment=fragment), re.DOTALL)[0]
    return {name: html.unescape(value) for name, value in re.findall(r'data-([\w-]+)="([^"]*)"', body)}
