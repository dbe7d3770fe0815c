"""Writing files: a name stands for a complete file, or for none."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write each file under a temporary name in the same folder, made if absent, then rename them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = {name: folder / f".{name}.{uuid.uuid4().hex}" for name in contents}
    try:
        for name, content in contents.items():
            with temporaries[name].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
