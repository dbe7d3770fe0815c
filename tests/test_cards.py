"""What the cards of the packaged models say that these do, measured again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
import torch

from mamba_ioi import Patch, cache, load_model, metrics
from mamba_ioi.experiments import EXPERIMENTS
from mamba_ioi.interventions.patch import Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import MambaModel
from mamba_ioi.tasks import generate
from mamba_ioi.tasks.pairs import PromptPairs
from mamba_ioi.zoo import EMBEDDED
from mamba_ioi.zoo.found import FOUND
from mamba_ioi.zoo.train_tiny import FAMILIES, card

STOP, GAVE, LAST = 12, 16, 19
"""In the aligned templates: the end of the first sentence, the token after the last name, the last token."""
PLACES = (3, 5, 7, 13, 15)
"""Where the five names stand. Each kind of pairs changes one of them."""
HEADS = [1, 2, 4]

Change = Patch | Resample


def of_tiny(model: MambaModel, data: PromptPairs, at: torch.Tensor) -> list[list[Change]]:
    taps = [[Resample("conv_slice", 1, at - tap, tap)] for tap in (-1, -3)]
    states = [[Resample("h", 1, [position])] for position in (STOP, LAST)]
    return [[Resample("layer_input", 1, at)], *taps, *states, [Resample("out_proj", 1, [LAST])]]


def of_tiny_mamba2(model: MambaModel, data: PromptPairs, at: torch.Tensor) -> list[list[Change]]:
    sites = [("h", 0), ("y", 0), ("ssm_output", 0)]
    here, there = (cache(model, tokens, sites) for tokens in (data.clean_tokens, data.corrupt_tokens))
    some, others = (here["h", 0][:, [STOP]].clone() for _ in range(2))
    for heads, value in ((HEADS, some), ([head for head in range(model.n_heads) if head not in HEADS], others)):
        value[:, :, heads] = there["h", 0][:, [STOP]][:, :, heads]
    direct = (here["y", 0] + there["ssm_output", 0] - there["y", 0])[:, [GAVE]]
    reach = [Resample("conv_slice", 1, [LAST], -3, channels) for channels in ("x", "B", "C")]
    return [
        *([Resample("conv_slice", 0, at - tap, tap, channels)] for channels in ("x", "B", "C") for tap in (-1, -3)),
        [Resample("h", 0, [STOP])],
        [Patch("h", 0, some, [STOP])],
        [Patch("h", 0, others, [STOP])],
        [Resample("y", 0, [GAVE])],
        [Patch("ssm_output", 0, direct, [GAVE])],
        [Resample("out_proj", 0, [GAVE])],
        *([change] for change in reach),
        [Resample("conv_slice", 2, [LAST], -3, "x")],
        *([Resample("h", 3, [position])] for position in (STOP, LAST)),
        *([Resample("out_proj", layer, [LAST])] for layer in range(6)),
    ]


MEASURED = {"tiny": of_tiny, "tiny-mamba2": of_tiny_mamba2}
"""The changes of the rows of each card's table, in order."""


def effects(name: str) -> Sequence[Sequence[float]]:
    """1 - NLD of each change, by the name that pairs differ in: those that `mamba-ioi reproduce` draws for Figure 4."""
    model = load_model(name)
    data = generate("ioi", model.tokenizer, 160, seed=27, templates="aligned", symmetric=True)
    rows, at = (data.clean_tokens != data.corrupt_tokens).nonzero().T
    assert rows.tolist() == list(range(160)) and set(at.tolist()) == set(PLACES)
    readout = Readout.of(data)
    asked = [[], [Resample("embed", None, at[:, None])], *MEASURED[name](model, data, at[:, None])]
    clean, corrupt, *found = sweep(model, data.clean_tokens, asked, readout, source=data.corrupt_tokens)
    answers = readout.answers, readout.corrupt_answers
    each = [1 - metrics.normalized_logit_diff(one, clean, corrupt, *answers, absolute=False) for one in found]
    return [[one[at == place].mean().item() for place in PLACES] for one in each]


def told(card_: str) -> list[list[float]]:
    """The rows of five numbers in a card."""
    found = re.findall(r"^\| .* \|((?: -?\d\.\d\d \|){5})$", card_, re.M)
    return [[float(number) for number in row.strip(" |").split(" | ")] for row in found]


@pytest.mark.parametrize("name", MEASURED)
def test_what_the_card_says_is_what_is_measured(name: str) -> None:
    numbers, expected = told((EMBEDDED[name] / "README.md").read_text(encoding="utf-8")), effects(name)
    assert len(numbers) == len(expected)
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected), rtol=0, atol=0.0051)


def test_what_removal_says_of_tiny_mamba2() -> None:
    (least,) = re.findall(r"with any one of them removed, accuracy is (0\.\d+) or more", FOUND["tiny-mamba2"])
    result = EXPERIMENTS["layer_removal"](load_model("tiny-mamba2"), pairs=40, progress=False)
    table = result.table.set_index("layer")
    assert table.accuracy[[1, 2, 3, 4, 5]].min() == pytest.approx(float(least)) and table.accuracy[0] < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_is_what_training_writes(family: str) -> None:
    folder = EMBEDDED[FAMILIES[family].name]
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert card(family, report) == (folder / "README.md").read_text(encoding="utf-8")
    assert "What it does" not in card(family, report | {"seed": 1}), "other weights may do otherwise"
