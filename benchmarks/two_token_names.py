"""Names of two tokens: which layer joins a name's tokens?

Trains a Mamba of 4 layers on the indirect-object task with names of two tokens, a first and a last name, either of
which other names share; then cuts each name's tokens from each other, and from the tokens after it, layer by layer.
`docs/how-to/token-to-token.md` tells what came out; this prints it:

    python benchmarks/two_token_names.py OUT [--seed 0] [--steps 500] [--pairs 200]

A folder OUT that holds a model is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase

from mamba_ioi import Cut, PromptPairs, load_model, metrics, run
from mamba_ioi.tasks.ioi import ALIGNED_TEMPLATES, BOS, OBJECTS, PLACES
from mamba_ioi.zoo.fast_forward import fast_logits
from mamba_ioi.zoo.tokenizer import build_tokenizer
from mamba_ioi.zoo.train_tiny import BATCH, LEARNING_RATE
from mamba_ioi.zoo.training import parameters, trained, write

FIRST = ("Alice", "Anthony", "Emily", "Frank", "Helen", "John", "Karen", "Lucy", "Mary", "Robert")
LAST = ("Dean", "Grace", "James", "Jordan", "Lee", "Logan", "Martin", "Morgan", "Murray", "Wallace")
KINDS = ("apart", "shared")
"""The three names of a prompt share no token; or the twin shares the answer's first one, and the other its last one."""
HELD_OUT = 8
"""One unordered triple of names in so many is never trained on."""
ROLES = {"answer": (0,), "twin": (1, 1), "other": (2, 2)}
"""The three names, by number; each as often as it is mentioned."""
CUTS = {
    "the first token from the second": ([0], 1),
    "both from the first token after the name": ([0, 1], 2),
    "the first token from the second one after the name": ([0], 3),
    "the second token from it": ([1], 3),
    "both from it": ([0, 1], 3),
    "both from the last position": ([0, 1], None),
    "the second token after the name from the last position": ([3], None),
}
"""What is cut from what, in tokens from the name's first one on; None is the prompt's last position."""


@dataclass(frozen=True)
class Drawn:
    """Prompts: token ids [B, L], the answers' two tokens last; who is named where.

    Attributes:
        tokens: the prompts, each with the two tokens of its answer.
        names: the tokens of the answer, of the twin and of the other, ``[B, 3, 2]``.
        places: the position of the first token of each of the five mentions, ``[B, 5]``.
        who: which of the three each mention names, ``[B, 5]``.
    """

    tokens: Tensor
    names: Tensor
    places: Tensor
    who: Tensor

    def at(self, which: int, mention: int) -> Tensor:
        """Where one of the three is named for the ``mention``-th time, ``[B]``."""
        order = (self.who == which).int().argsort(dim=1, descending=True, stable=True)[:, mention]
        return self.places.gather(1, order[:, None])[:, 0]


class Prompts:
    """Draws prompts: of triples that are trained on, or of the held-out ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.first, self.last, self.sites, self.things = (
            torch.tensor([tokenizer(f" {word}")["input_ids"] for word in words])[:, 0]
            for words in (FIRST, LAST, PLACES, OBJECTS)
        )
        texts = [BOS + template.replace("[NAME]", f"{FIRST[0]} {LAST[0]}") for template in ALIGNED_TEMPLATES]
        texts = [text.replace("[PLACE]", PLACES[0]).replace("[OBJECT]", OBJECTS[0]) for text in texts]
        self.forms = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
        self.mentions = (self.forms[0] == self.first[0]).nonzero()[:, 0]
        self.places_at, self.things_at = (
            (self.forms[0] == words[0]).nonzero().item() for words in (self.sites, self.things)
        )

    def triples(self, kind: str, count: int, generator: torch.Generator, held_out: bool) -> Tensor:
        """Numbers of first and last names ``[count, 3, 2]``: of the answer, the twin and the other."""
        found = torch.empty(0, 3, 2, dtype=torch.long)
        while len(found) < count:
            columns = [torch.rand(4 * count, 10, generator=generator).argsort(1)[:, :3] for _ in range(2)]
            drawn = torch.stack(columns, -1)
            if kind == "shared":  # the twin has the answer's first name, the other one its last name
                drawn[:, 1, 0], drawn[:, 2, 1] = drawn[:, 0, 0], drawn[:, 0, 1]
            low, middle, high = (10 * drawn[..., 0] + drawn[..., 1]).sort(1).values.unbind(1)
            hashed = (low * 7919 + middle * 104729 + high * 1299709) % 2147483647 % HELD_OUT == 0
            found = torch.cat([found, drawn[hashed == held_out]])
        return found[:count]

    def draw(self, kind: str, count: int, generator: torch.Generator, *, held_out: bool) -> Drawn:
        """So many prompts of one kind, of all forms in turn."""
        numbers = self.triples(kind, count, generator, held_out)
        names = torch.stack([self.first[numbers[..., 0]], self.last[numbers[..., 1]]], -1)
        order = torch.rand(count, 3, generator=generator).argsort(1)
        again = 1 + torch.rand(count, 2, generator=generator).argsort(1)
        who = torch.cat([order, again], 1)
        form = torch.arange(count) % len(self.forms)
        rows = self.forms[form]
        for place, words in ((self.places_at, self.sites), (self.things_at, self.things)):
            rows[:, place] = words[torch.randint(len(words), (count,), generator=generator)]
        mentioned = names.gather(1, who[..., None].expand(-1, -1, 2))
        rows[:, self.mentions], rows[:, self.mentions + 1] = mentioned.unbind(-1)
        return Drawn(torch.cat([rows, names[:, 0]], 1), names, self.mentions.expand(count, -1), who)


def build(vocab_size: int) -> MambaForCausalLM:
    """The model, with weights drawn."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "state_size": 8, "time_step_rank": 8, "expand": 2}
    config = MambaConfig(
        vocab_size=vocab_size, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True
    )
    return MambaForCausalLM(config)


def train(out: Path, seed: int, steps: int) -> None:
    """Train the model, and write it to a folder."""
    tokenizer = build_tokenizer()
    prompts = Prompts(tokenizer)

    def losses(model, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.cat([prompts.draw(k, BATCH // 2, generator, held_out=False).tokens for k in KINDS])
        logits, targets = fast_logits(model, rows[:, :-1]), rows[:, 1:]
        found = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return found.mean() + found[:, -2:].mean(), found[:, -2:].mean()

    how = {"seed": seed, "steps": steps, "learning_rate": LEARNING_RATE, "progress": True}
    model, loss, passed = trained(build, len(tokenizer), losses, **how)
    report = {"seed": seed, "steps": steps, "minutes": passed, "loss": round(loss, 4), "parameters": parameters(model)}
    write(out, model, tokenizer, report, f"An example, made by `{Path(__file__).name} --seed {seed}`.\n")
    print(f"trained in {passed} minutes of one core, loss {loss:.3f}")


def questions(prompts: Prompts, kind: str, count: int) -> Iterator[tuple[str, PromptPairs]]:
    """Pairs that ask for the answer's first token, and for its second token after the first.

    In the corrupt prompt the answer stands where the other (the twin) is mentioned again, which is then the answer.
    """
    drawn = prompts.draw(kind, count, torch.Generator().manual_seed(77), held_out=True)
    rows = torch.arange(count)
    for token, (question, rival) in enumerate((("first", 2), ("second", 1))):
        clean, corrupt = drawn.tokens[:, : token - 2].clone(), drawn.tokens[:, : token - 2].clone()
        for part in range(2):
            corrupt[rows, drawn.at(rival, 1) + part] = drawn.names[:, 0, part]
        if token:
            corrupt[:, -1] = drawn.names[:, rival, 0]
        marks = {
            f"{role} {mention + 1}": drawn.at(which, mention)
            for role, mentions in ROLES.items()
            for mention, which in enumerate(mentions)
        }
        yield (
            question,
            PromptPairs(
                clean_tokens=clean,
                corrupt_tokens=corrupt,
                answers=drawn.names[:, 0, token],
                corrupt_answers=drawn.names[:, rival, token],
                marks=marks,
            ),
        )


def accuracy(model, pairs: PromptPairs, layers: list[int], sources: list[int], target: int | None) -> float:
    """How often the model is right with each mention's sources cut from its target in some layers, by scan and conv."""
    cuts = []
    for mark in pairs.marks:
        first = pairs.positions_of(mark)[:, None]
        at = pairs.last_position[:, None] if target is None else first + target
        cuts.append(Cut(layers, torch.cat([first + source for source in sources], 1), at, conv=True))
    logits = run(model, pairs.clean_tokens, cuts if layers else [], positions=pairs.last_position)
    return metrics.accuracy(logits, pairs.answers, pairs.candidates).double().mean().item()


def main() -> None:
    """Train, and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("seed", 0), ("steps", 500), ("pairs", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if not (given.out / "config.json").is_file():
        train(given.out, given.seed, given.steps)
    model = load_model(given.out)
    prompts, every = Prompts(model.tokenizer), list(range(model.n_layers))
    for kind in KINDS:
        for question, pairs in questions(prompts, kind, given.pairs):
            print(f"\n{kind}, the answer's {question} token: right in {accuracy(model, pairs, [], [0], 1):.2f}; cut")
            rows = {
                name: {"all": accuracy(model, pairs, every, *cut)}
                | {str(layer): accuracy(model, pairs, [layer], *cut) for layer in every}
                for name, cut in CUTS.items()
            }
            print(pd.DataFrame(rows).T.to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
