"""Sandboxes that start at once: a process that has imported NDIF's runner and built the model forks one per request.

NDIF starts a fresh interpreter for each request, which takes seconds on a quick machine and most of a minute on a busy
one. What a request then runs in is the same: NDIF's own runner, in a process of its own, without weights.

``python forked_runners.py MODEL_KEY`` serves: each line it reads is the path of a socket, and it answers with the
process id of the runner that listens there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable


class Forked:
    """A runner's process, as `subprocess.Popen` would show it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """None while it runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self, timeout: float = 60.0) -> int:
        """Until it has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("runner", timeout)
            time.sleep(0.01)
        return 0

    def terminate(self) -> None:
        """Ask it to end."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)


class Template:
    """The process that forks, seen from the actor."""

    def __init__(self, model_key: str, environment: dict[str, str]) -> None:
        command = [sys.executable, __file__, model_key]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.lock = threading.Lock()

    def fork(self, path: str) -> Forked:
        """A runner that listens at a socket.

        Raises:
            RuntimeError: if this process has ended.
        """
        with self.lock:
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks runners has ended")
        return Forked(int(answer))


def spawner(environment: dict[str, str]) -> Callable:
    """A substitute for NDIF's `host.spawn`."""
    from ndif.services.ray.sandbox import host

    templates: dict[str, Template] = {}
    lock, numbers = threading.Lock(), iter(range(10**9))

    def spawn(*, model_key: str, **options) -> host.Sandbox:
        with lock:
            if model_key not in templates:
                templates[model_key] = Template(model_key, environment)
            path = os.path.join(tempfile.gettempdir(), f"forked-{os.getpid()}-{next(numbers)}.sock")
        return host.Sandbox(path, templates[model_key].fork(path))

    return spawn


def main() -> None:
    """Import, build, and fork."""
    from ndif.services.ray.sandbox import nns
    from ndif.services.ray.sandbox.runner import Runner, die_with_parent

    nns.load_meta_model(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended runners leave nothing behind
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            die_with_parent()
            runner = Runner(line.strip())
            os.write(writer, b".")  # it listens
            runner.serve()
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
