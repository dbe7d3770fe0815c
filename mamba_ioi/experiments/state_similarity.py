"""Figure 7: which tokens' contributions a layer's state still holds, later in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import listed
from ..interventions.run import cache
from ..models.model import MambaModel
from ..remote.requests import ask
from ..result import Result
from ..tasks.ioi_prompts import with_bos
from ..tasks.pairs import PromptPairs
from .bottleneck import bottleneck, default_layer
from .common import check_data, check_layer


def state_similarity(
    model: MambaModel,
    prompts: str | Sequence[str] | PromptPairs,
    layer: int | None = None,
    *,
    seed: int = 27,
    progress: bool = True,
) -> Result:
    """The cosine of each token's contribution to the state with the state after each token.

    Token i adds B_bar_i x_i [E, N] to the state, the site ``write`` (the paper's equation 5); h_j [E, N] is the state
    after token j. Both are compared as vectors of E N entries (of a Mamba-2 [H, P, N], which are as many), for all i
    and j: where i > j the token is not in the state yet, and what similarity there is comes from tokens before it
    (paper, Section 4.2 and Figure 7). A contribution or state of length 0 has similarity 0.

    Args:
        model: a Mamba with a tokenizer.
        prompts: texts of any kind and length, each run alone; ``<|endoftext|>`` is put in front, as in the paper's
            data. Of pairs, the clean prompts, in their own tokens.
        layer: the layer; if None the model's bottleneck, on those pairs or on a few drawn with ``seed``.
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
    chosen = _prompts(model, prompts)
    if layer is not None:
        layer = check_layer(model, layer)
    elif isinstance(prompts, PromptPairs):
        layer = bottleneck(model, prompts, progress=progress)
    else:
        layer = default_layer(model, seed=seed, progress=progress)
    parts = []
    for text, ids in tqdm(chosen.items(), desc="state similarity", disable=not progress):
        similarity = ask(model, contribution_similarity, ids, layer)["similarity"].cpu().numpy()
        tokens = np.array([model.tokenizer.decode([token]) for token in ids[0].tolist()])
        i, j = (index.ravel() for index in np.indices(similarity.shape))
        columns = {"prompt": text, "i": i, "j": j, "similarity": similarity.ravel()}
        parts.append(pd.DataFrame(columns | {"label_i": tokens[i], "label_j": tokens[j]}))
    table = pd.concat(parts, ignore_index=True)
    return Result.create("state_similarity", table, model=model, arguments={"layer": layer, "prompts": list(chosen)})


def _prompts(model: MambaModel, prompts: str | Sequence[str] | PromptPairs) -> dict[str, Int[Tensor, "1 L"]]:
    """The tokens of each prompt, by its text; of pairs, each different clean prompt once."""
    if isinstance(prompts, PromptPairs):
        check_data(model, prompts)
        found: dict[str, Tensor] = {}
        for ids, last in zip(prompts.clean_tokens, prompts.last_position.tolist(), strict=True):
            own = ids[: last + 1]
            shown = own[1:] if own[0] == model.tokenizer.bos_token_id else own
            found.setdefault(model.tokenizer.decode(shown.tolist()), model.to_tokens(own[None])[0])
        return found
    texts = listed([prompts] if isinstance(prompts, str) else prompts)
    if not texts or not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < len(texts):
        raise ValueError(f"prompts are one or more different texts that are not empty, not {prompts!r}")
    return {text: model.to_tokens(with_bos(model.tokenizer, text))[0] for text in texts}


def contribution_similarity(model: MambaModel, ids: Tensor, layer: int) -> dict[str, Float[Tensor, "L L"]]:
    """``similarity``: the cosine of what each token writes (rows) with h_j (columns) of one prompt [1, L]."""
    found = cache(model, ids, [("write", layer), ("h", layer)])
    contributions, states = (found[name, layer][0].double().flatten(1) for name in ("write", "h"))
    lengths = torch.outer(contributions.norm(dim=1), states.norm(dim=1))
    products = contributions @ states.T
    return {"similarity": torch.where(lengths > 0, products / lengths.where(lengths > 0, 1.0), 0.0)}
