"""The logit lens: what the residual stream says of the answer after each layer, at each place."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from ..interventions.lens import EMBED, lens_logits
from ..interventions.readout import Readout
from ..metrics import answer_probability, logit_diff
from ..models.model import CausalLM
from ..result import Result
from ..tasks.pairs import PromptPairs
from .common import cell_columns, check_any_places, check_data, check_layers, mean_where, positions_at


def logit_lens(
    model: CausalLM,
    pairs: PromptPairs,
    layers: Sequence[int] | int | None = None,
    *,
    positions: Sequence[int] | int | None = None,
    marks: Sequence[str] | str | None = None,
) -> Result:
    """Unembed the residual stream of the clean prompts after each layer, by the model's own final norm and head.

    After nostalgebraist's logit lens (2020): what the model would answer if the layers that follow added nothing.

    Args:
        model: any causal language model whose blocks pass on a residual stream.
        pairs: pairs of prompts.
        layers: after which layers to look, beside the embeddings; all if None.
        positions: where to look; every position of data whose rows are aligned if None.
        marks: look at these places instead, each row's own; of other data all of their marks and ``last`` if None.

    Returns:
        A row for each layer (-1: what layer 0 begins with) and place: ``layer``, ``position`` and ``label``, or
        ``mark``; ``logit_diff`` (mean logit of the answer less that of the corrupt prompt's), ``low`` and ``high`` (its
        bootstrap 95 % interval), ``probability`` (mean probability of the answer among the pair's candidates),
        ``rank`` (mean rank of the answer in the vocabulary, of a set of the best of them; 1 is the top), ``n`` (rows
        that have the place).

    Raises:
        ValueError: for a layer, position or mark that is not there, or a model that carries edits or hooks.
    """
    check_data(model, pairs)
    chosen = [EMBED, *check_layers(model, layers)]
    places = check_any_places(pairs, positions, marks)
    model.require_stream("logit lenses")
    at = positions_at(pairs, places)
    readout = Readout.of(pairs)
    logits, ranks = lens_logits(
        model, pairs.clean_tokens, chosen, at.clamp(min=0), readout.tokens, pairs.answer_sets[0]
    )
    columns: dict[str, list] = {"logit_diff": [], "probability": [], "rank": []}
    for layer in range(len(chosen)):
        for column in range(len(places)):
            run = logits[layer, :, column].float()
            columns["logit_diff"].append(logit_diff(run, readout.answers, readout.corrupt_answers))
            columns["probability"].append(answer_probability(run, readout.answers, readout.candidates))
            columns["rank"].append(ranks[layer, :, column])
    some = (at >= 0).T.repeat(len(chosen), 1)
    difference, low, high = mean_where(torch.stack(columns["logit_diff"]).cpu(), some)
    table = pd.DataFrame(cell_columns(pairs, chosen, places))
    table["logit_diff"], table["low"], table["high"] = difference, low, high
    for name in ("probability", "rank"):
        values = torch.stack(columns[name]).cpu().double()
        table[name] = torch.where(some, values, torch.nan).nanmean(1).numpy()
    table["n"] = some.sum(1).numpy()
    arguments = {"rows": len(pairs), "layers": chosen[1:]} | ({"marks": places} if "mark" in table else {})
    return Result.create("logit_lens", table, model=model, arguments=arguments)
