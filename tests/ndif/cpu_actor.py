"""A model actor of NDIF that loads on the CPU (``NDIF_MODEL_IMPORT_PATH``); it runs in the server's environment."""

import os

import ray
import torch
from forked_runners import spawner
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

NARROW_SECONDS = 40.0


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUSandboxModelActor(SandboxModelDeployment):
    """Trusted requests run in this process, others in a sandbox. The model `narrow` gets little time for each."""

    CACHEABLE = False

    def __init__(self, model_key, execution_timeout=None, **kwargs):
        here = {name: os.environ[name] for name in ("HF_ENDPOINT", "OMP_NUM_THREADS", "PYTHONPATH")}
        host.spawn = spawner(host.runner_env() | here | {"PYTHONHASHSEED": "0"})
        host.Pool.acquire.__defaults__ = (600.0,)  # seconds, of which NDIF allows 30
        torch.cuda.synchronize = lambda *args, **kwargs: None  # NDIF calls it after every request, without asking
        if "mamba-ioi/narrow" in model_key:
            execution_timeout = NARROW_SECONDS
        super().__init__(model_key, execution_timeout, **kwargs)

    def load_from_disk(self):
        """The model, on the CPU, without gradients for its weights: as NDIF serves it."""
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model
