"""A server in a process without this package: it runs requests from its standard input as an NDIF server would.

What a server lacks is refused here by name, whatever is installed; as in NDIF's sandbox, a request does not write back
what waits, and a trace that stops early leaves none for the next. Each line is a request, in base64; the answer is a
line too: OK and the compressed result, or ERR and the traceback. The arguments are the model's folder, and the folder
that the client has its transformers from: versions differ in what they compute.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import traceback

sys.path.insert(0, sys.argv[2])

import torch
import zstandard
from greenlet import getcurrent
from nnsight import TransformersModel
from nnsight.intervention.interleaver import Mediator, Pending
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import _saves, dec, inc

ABSENT = ("mamba_ioi", "einops", "jaxtyping", "beartype", "pandas", "tqdm", "psutil", "tenacity", "seaborn")


def event(cls, kind, location, *rest):
    """`Mediator.event` without its flush."""
    return getcurrent().parent.switch(Pending(kind, location, cls.current(location).wanted(location), *rest))


def stop(tracer):
    """`InterleavingTracer.stop`, after which a sandbox takes the end of this trace for that of the next."""
    raise RuntimeError("a trace that stops early leaves no results to the next one of the same request")


class Absent:
    """An importer that finds none of the packages that a server lacks."""

    def find_spec(self, name, path=None, target=None):
        """Refuse a package that is absent; leave the others to Python."""
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def answer(model: TransformersModel, line: str) -> str:
    """What becomes of one request."""
    try:
        objects = model._remoteable_persistent_objects()
        tracer = RequestModel.deserialize(base64.b64decode(line), objects, compress=True)
        inc()
        try:
            tracer.execute(tracer.info.code)
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        finally:
            dec()
        content = io.BytesIO()
        torch.save(saved, content)
        return f"OK {base64.b64encode(zstandard.ZstdCompressor().compress(content.getvalue())).decode()}"
    except BaseException as error:
        return f"ERR {json.dumps(''.join(traceback.format_exception(error)))}"


def main() -> None:
    """Serve the model in the folder that the command line names."""
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr
    model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True, device="cpu")
    model._module.requires_grad_(False)
    for name in [name for name in sys.modules if name.partition(".")[0] in ABSENT]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent())
    Mediator.event = classmethod(event)
    InterleavingTracer.stop = stop
    print("READY", file=out, flush=True)
    for line in sys.stdin:
        print(answer(model, line), file=out, flush=True)


if __name__ == "__main__":
    main()
