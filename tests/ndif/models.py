"""Write the models that the server is to serve, and print them as the arguments of `server.sh up`: ``models.py DIR``.

``tiny`` and ``tiny-mamba2`` are the packaged models; ``narrow`` and ``wide`` are random Mambas that differ in width
alone; ``broken`` has a config and no weights, so that it cannot be deployed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from transformers import AutoTokenizer, MambaConfig

from mamba_ioi.zoo import EMBEDDED
from tests.conftest import random_mamba

WIDTHS = {"narrow": 16, "wide": 256}


def main(folder: Path) -> None:
    """Write what is not packaged."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    for name, width in WIDTHS.items():
        module = random_mamba(hidden_size=width, vocab_size=len(tokenizer), num_hidden_layers=4)
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    MambaConfig(hidden_size=16, num_hidden_layers=2, architectures=["MambaForCausalLM"]).save_pretrained(
        folder / "broken"
    )
    tokenizer.save_pretrained(folder / "broken")
    for name, packaged in EMBEDDED.items():
        shutil.copytree(packaged, folder / name, dirs_exist_ok=True)
    print(*(f"mamba-ioi/{name}={folder / name}" for name in (*EMBEDDED, "broken", *WIDTHS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
