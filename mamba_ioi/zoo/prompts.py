"""What the embedded models are trained on: whole prompts of the indirect-object task and of two-name variations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..tasks.ioi import BOS, OBJECTS, PLACES, TEMPLATES

HELD_OUT_SHARE = 8  # one name triple in eight is never trained on

_TWO_NAMES = tuple(
    template.replace("[NAME], [NAME] and [NAME]", "[NAME] and [NAME]").replace("[NAME] and [NAME] gave", "[NAME] gave")
    for template in TEMPLATES
)


@dataclass(frozen=True)
class _Form:
    """A template as token ids, with the places in it that are filled anew for every prompt."""

    ids: list[int]
    names: list[int]
    place: int
    thing: int


class Prompts:
    """Draws whole prompts, answers included, for training (held-out triples never) or testing (only those)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
        def token(word: str) -> int:
            (only,) = tokenizer(" " + word)["input_ids"]
            return only

        self.names = torch.tensor([token(name) for name in names])
        self.places = torch.tensor([token(place) for place in PLACES])
        self.things = torch.tensor([token(thing) for thing in OBJECTS])
        self.forms = [self._form(tokenizer, template, names[0]) for template in (*TEMPLATES, *_TWO_NAMES)]
        self.length = max(len(form.ids) for form in self.forms) + 1

    def _form(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> _Form:
        text = template.replace("[NAME]", name).replace("[PLACE]", PLACES[0]).replace("[OBJECT]", OBJECTS[0])
        ids = tokenizer(BOS + text)["input_ids"]
        names = [i for i, token in enumerate(ids) if token == self.names[0]]
        return _Form(ids, names, ids.index(int(self.places[0])), ids.index(int(self.things[0])))

    def held_out(self, triples: Int[Tensor, "B 3"]) -> Bool[Tensor, "B"]:
        """Whether the unordered triple (indices of names) is kept out of training."""
        low, middle, high = triples.sort(dim=1).values.unbind(1)
        return ((low * 7919 + middle * 104729 + high * 1299709) % 2147483647 % HELD_OUT_SHARE) == 0

    def draw(
        self, form: int, count: int, generator: torch.Generator, *, held_out: bool
    ) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B 3"]]:
        """Prompts of one form with their answers, padded with -1, and the token ids of their names (answer first)."""
        shape = self.forms[form]
        triples = torch.empty(0, 3, dtype=torch.long)
        while len(triples) < count:
            drawn = torch.rand(4 * count, len(self.names), generator=generator).topk(3, dim=1).indices
            triples = torch.cat([triples, drawn[self.held_out(drawn) == held_out]])
        names = self.names[triples[:count]]
        answer, first, second = names.unbind(1)
        if len(shape.names) == 5:
            order = torch.rand(count, 3, generator=generator).argsort(1)
            slots = torch.cat([names.gather(1, order), torch.stack([first, second], 1)], 1)
        else:
            order = torch.rand(count, 2, generator=generator).argsort(1)
            slots = torch.cat([names[:, :2].gather(1, order), first[:, None]], 1)
        rows = torch.full((count, self.length), -1)
        rows[:, : len(shape.ids)] = torch.tensor(shape.ids)
        rows[:, shape.names] = slots
        rows[:, shape.place] = self.places[torch.randint(len(self.places), (count,), generator=generator)]
        rows[:, shape.thing] = self.things[torch.randint(len(self.things), (count,), generator=generator)]
        rows[:, len(shape.ids)] = answer
        return rows, names

    def batch(self, count: int, generator: torch.Generator) -> Int[Tensor, "B L"]:
        """A training batch: three quarters of it three-name prompts, the forms of each kind in turn."""
        forms = [*range(4)] * 3 + [*range(4, 8)]
        each = -(-count // len(forms))
        return torch.cat([self.draw(form, each, generator, held_out=False)[0] for form in forms])[:count]
