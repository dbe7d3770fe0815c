"""A model actor of NDIF that loads on the CPU (``NDIF_MODEL_IMPORT_PATH``); it runs in the server's environment."""

import ray
import torch
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda *args, **kwargs: None  # NDIF calls it without asking


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUSandboxModelActor(SandboxModelDeployment):
    """Trusted requests run in this process, others in a sandbox."""

    CACHEABLE = False

    def load_from_disk(self):
        """The model, on the CPU, without gradients for its weights: as NDIF serves it."""
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model
