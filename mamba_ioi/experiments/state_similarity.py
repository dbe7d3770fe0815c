"""Figure 7: which tokens' contributions a layer's state still holds, later in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import listed
from ..interventions.run import cache
from ..models.model import MambaModel
from ..remote.requests import ask
from ..result import Result
from ..tasks.ioi import BOS, TEMPLATES, IOIDataset
from ..tasks.names import NAMES
from .bottleneck import default_layer
from .common import check_layer


def state_similarity(
    model: MambaModel,
    prompts: str | Sequence[str],
    layer: int | None = None,
    *,
    seed: int = 27,
    progress: bool = True,
) -> Result:
    """The cosine of each token's contribution to the state with the state after each token.

    Token i adds B_bar_i x_i [E, N] to the state (the paper's equation 5); h_j [E, N] is the state after token j. Both
    are compared as vectors of E N entries, for all i and j: where i > j the token is not in the state yet, and what
    similarity there is comes from tokens before it (paper, Section 4.2 and Figure 7). A contribution or state of
    length 0 has similarity 0.

    Args:
        model: a Mamba with a tokenizer.
        prompts: texts of any kind and length, each run alone; ``<|endoftext|>`` is put in front, as in the data.
        layer: the layer; the model's bottleneck on a few pairs drawn with ``seed`` if None.
        seed: of those pairs.
        progress: show a bar.

    Returns:
        A row for each prompt, i and j: ``similarity``, and the tokens ``label_i`` and ``label_j``.

    Raises:
        ValueError: if the model is no Mamba or has no tokenizer, a text is empty or named twice, or the layer is not
            there.
    """
    model.require_mamba("state similarities")
    if model.tokenizer is None:
        raise ValueError(f"{model.model_id} has no tokenizer, which state_similarity needs to read prompts")
    texts = listed([prompts] if isinstance(prompts, str) else prompts)
    if not texts or not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < len(texts):
        raise ValueError(f"prompts are one or more different texts that are not empty, not {prompts!r}")
    layer = default_layer(model, seed=seed, progress=progress) if layer is None else check_layer(model, layer)
    parts = []
    for text in tqdm(texts, desc="state similarity", disable=not progress):
        ids, _ = model.to_tokens(with_bos(model.tokenizer, text))
        similarity = ask(model, contribution_similarity, ids, layer)["similarity"].cpu().numpy()
        tokens = np.array([model.tokenizer.decode([token]) for token in ids[0].tolist()])
        i, j = (index.ravel() for index in np.indices(similarity.shape))
        columns = {"prompt": text, "i": i, "j": j, "similarity": similarity.ravel()}
        parts.append(pd.DataFrame(columns | {"label_i": tokens[i], "label_j": tokens[j]}))
    table = pd.concat(parts, ignore_index=True)
    return Result.create("state_similarity", table, model=model, arguments={"layer": layer, "prompts": texts})


def contribution_similarity(model: MambaModel, ids: Tensor, layer: int) -> dict[str, Float[Tensor, "L L"]]:
    """``similarity``: the cosine of B_bar_i x_i (rows) with h_j (columns) of one prompt [1, L]."""
    found = cache(model, ids, [("ssm_input", layer), ("B_bar", layer), ("h", layer)])
    x, B_bar, h = (found[name, layer][0].double() for name in ("ssm_input", "B_bar", "h"))
    contributions, states = (B_bar * x[..., None]).flatten(1), h.flatten(1)
    lengths = torch.outer(contributions.norm(dim=1), states.norm(dim=1))
    products = contributions @ states.T
    return {"similarity": torch.where(lengths > 0, products / lengths.where(lengths > 0, 1.0), 0.0)}


def with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with the token in front with which every prompt of `IOIDataset` begins.

    Raises:
        ValueError: if the tokenizer has neither ``<|endoftext|>`` nor a BOS token of its own.
    """
    bos = BOS if BOS in tokenizer.get_vocab() else tokenizer.bos_token
    if bos is None:
        raise ValueError(f"the tokenizer has neither {BOS} nor a BOS token of its own, with which every prompt begins")
    return text if text.startswith(str(bos)) else f"{bos}{text}"


def example_prompts(tokenizer: PreTrainedTokenizerBase, *, seed: int = 27) -> list[str]:
    """Prompts for Figure 7: two drawn by the seed, and one whose names are several tokens each, if there are such.

    Raises:
        ValueError: as `IOIDataset.generate`.
    """
    drawn = IOIDataset.generate(tokenizer, 2, seed=seed, templates=[TEMPLATES[3]], symmetric=False).clean_text
    long = []
    for name in NAMES:
        ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        if len(ids) > 1 and tokenizer.unk_token_id not in ids:
            long.append(name)
    if len(long) < 3:
        return drawn
    one, other, third = long[:: len(long) // 3][:3]
    return [*drawn, f"Friends {one}, {other} and {third} went to the store. {one} and {other} gave a drink to"]
