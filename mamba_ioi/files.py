"""Writing files: a name stands for a complete file, or for none; a folder is one process's at a time."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"
_PATIENCE = 0.2
"""How long, in seconds, to wait for a run that is just ending."""


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


def refuse_file(folder: Path) -> None:
    """Refuse a file where a folder should be.

    Raises:
        ValueError: if it is one.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file where a folder should be")


@contextmanager
def locked(folder: Path, other: str = "folder") -> Iterator[None]:
    """Keep the folder, made if absent, to this process; the system lets it go when the process ends, however it ends.

    Args:
        folder: the folder.
        other: what another one is given as, for the sentence that refuses.

    Raises:
        ValueError: if another process has it, or it is a file.
        OSError: if it cannot be written.
    """
    from filelock import FileLock, Timeout

    refuse_file(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder} is in use by another run; wait for it, or choose another {other}") from None
    try:
        yield
    except OSError as error:
        if error.filename is None:  # as when the disk is full: say at least where
            error.filename = str(folder)
        raise
    finally:
        with suppress(OSError):  # Windows takes the file away when the lock is released, and not before
            (folder / _LOCK).unlink()
        lock.release()
        if made:
            with suppress(OSError):  # not empty: keep it
                folder.rmdir()
