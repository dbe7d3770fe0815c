"""Prompts of the indirect object identification (IOI) task with three names, and their corruptions.

The task is that of "Investigating the Indirect Object Identification circuit in Mamba" (arXiv 2407.14008,
Appendix A): two of three names are repeated, and the model should continue with the third. A corruption
replaces every instance of one name by another, which changes the answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import whole_number
from .columns import check_rows, integers, refuse, texts
from .names import NAMES, name_tokens, single_token_names
from .pairs import Groups, Marks, PromptPairs
from .task import Task
from .words import choice

__all__ = [
    "ALIGNED_TEMPLATES",
    "BOS",
    "CORRUPTIONS",
    "NAMES",
    "OBJECTS",
    "PLACES",
    "TEMPLATES",
    "IOIDataset",
    "single_token_names",
]

BOS = "<|endoftext|>"
TEMPLATES: tuple[str, ...] = (
    "Then, [NAME], [NAME] and [NAME] went to the [PLACE]. [NAME] and [NAME] gave a [OBJECT] to",
    "Afterwards [NAME], [NAME] and [NAME] went to the [PLACE]. [NAME] and [NAME] gave a [OBJECT] to",
    "When [NAME], [NAME] and [NAME] arrived at the [PLACE], [NAME] and [NAME] gave a [OBJECT] to",
    "Friends [NAME], [NAME] and [NAME] went to the [PLACE]. [NAME] and [NAME] gave a [OBJECT] to",
)
# The templates whose names stand at the same positions under the GPT-NeoX tokenizer.
ALIGNED_TEMPLATES: tuple[str, ...] = (TEMPLATES[0], TEMPLATES[1], TEMPLATES[3])
# Three names, the two repeated names, the answer; different letters are different names.
CORRUPTIONS: tuple[str, ...] = (
    "CAB AB C -> DAB AB D",
    "ACB AB C -> ADB AB D",
    "ABC AB C -> ABD AB D",
    "ABC AB C -> ABC AC B",
    "ABC AC B -> ABC BC A",
)
PLACES: tuple[str, ...] = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS: tuple[str, ...] = ("apple", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class IOIDataset(PromptPairs):
    """Pairs of a clean and a corrupt prompt, one pair a row, which share template, place and object.

    Tokens begin with BOS and are padded on the right to the longest prompt: read logits at `last_position`. `marks` are
    n1 … n5, from `name_positions`; `groups` are corruption and template. What a `PromptPairs` has besides holds too.

    Attributes:
        clean_tokens: [B, L] token ids of the clean prompts.
        corrupt_tokens: [B, L] token ids of the corrupt prompts; length and name positions as clean.
        answers: [B] token id of the name that completes the clean prompt.
        corrupt_answers: [B] token id of the name that completes the corrupt prompt.
        candidates: [B, 4] token ids of the three or four names of the pair, padded with -1.
        name_positions: [B, 5] where the five names stand.
        last_position: [B] position of the last token that is not padding.
        templates: Each row's template.
        corruptions: Each row's corruption. A swapped row (`symmetric=True`) keeps the label of its pair, so
            that a group holds both directions; there the right side of the label describes the clean prompt.
        clean_text: The clean prompts without BOS.
        corrupt_text: The corrupt prompts without BOS.
    """

    name_positions: Int[Tensor, "B 5"]
    templates: list[str]
    corruptions: list[str]
    clean_text: list[str]
    corrupt_text: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clean_text", "corrupt_text"):
            self._set(name, texts(getattr(self, name), name, len(self)))

    def _checked_marks(self) -> dict[str, Tensor]:
        """The marks: n1 … n5, one a column of the names' positions, and others that were given."""
        names = integers(self.name_positions, "name_positions", dims=(2,), device=self.clean_tokens.device)
        check_rows(len(names), len(self), "name_positions", "clean_tokens")
        if names.shape[1] != 5:
            raise ValueError(f"name_positions must be [B, 5], a column a name, not of shape {tuple(names.shape)}")
        outside = (names < 0) | (names > self.last_position[:, None])
        refuse(outside, names, "name_positions", "is no position of the row's prompt")
        self._set("name_positions", names)
        own = {f"n{slot}": column for slot, column in enumerate(names.unbind(1), start=1)}
        self._set("marks", _with_own(self.marks, own, Marks))
        return super()._checked_marks()

    def _checked_groups(self) -> dict[str, list]:
        """The groups: corruption, template, and others that were given."""
        for name in ("corruptions", "templates"):
            self._set(name, texts(getattr(self, name), name, len(self)))
        own = {"corruption": self.corruptions, "template": self.templates}
        self._set("groups", _with_own(self.groups, own, Groups))
        return super()._checked_groups()

    @classmethod
    def generate(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        n_pairs: int,
        *,
        seed: int = 27,
        templates: str | Sequence[str] = "aligned",
        corruptions: str | Sequence[str] = "all",
        symmetric: bool = True,
    ) -> IOIDataset:
        """Draw pairs uniformly: template, corruption, place, object and names (paper, Appendix A).

        The same arguments give the same data on every machine; the first k pairs do not depend on `n_pairs`.
        The paper trains on seed 27 and holds out seed 28.

        Args:
            tokenizer: A transformers tokenizer. BOS is its `<|endoftext|>`, or else its own BOS token.
            n_pairs: How many pairs to draw.
            seed: Seed of the draw, 0 or more.
            templates: "aligned" (1, 2 and 4, whose positions agree), "all", or one or a list of `TEMPLATES`.
            corruptions: "all", or one or a list of `CORRUPTIONS`.
            symmetric: Append every pair swapped: row `n_pairs + i` is row i with clean and corrupt exchanged.

        Returns:
            A dataset of `n_pairs` rows, or `2 * n_pairs` if `symmetric`.

        Raises:
            ValueError: If an argument is out of range or names no template or corruption; if the tokenizer
                has no BOS token or fewer than four usable names; or if `templates="aligned"` and it does not
                align them.
        """
        n_pairs = whole_number(n_pairs, "n_pairs", least=1)
        rng = random.Random(whole_number(seed, "seed", least=0))
        groups = {"aligned": ALIGNED_TEMPLATES, "all": TEMPLATES}
        chosen = _choose(templates, "template", groups, TEMPLATES)
        patterns = _choose(corruptions, "corruption", {"all": CORRUPTIONS}, CORRUPTIONS)
        tokens_of = name_tokens(tokenizer)
        if len(tokens_of) < 4:
            raise ValueError(f"the tokenizer has {len(tokens_of)} names as single tokens; at least 4 are needed")
        if isinstance(templates, str) and templates == "aligned":
            _check_alignment(tokenizer, tokens_of)

        names = list(tokens_of)
        pairs = [_draw_pair(rng, chosen, patterns, names) for _ in range(n_pairs)]
        prompts, ids = [], []
        for side in (0, 1):
            prompts += [_fill(pair.template, pair.names[side][:5], pair.place, pair.object) for pair in pairs]
            ids += [[tokens_of[name] for name in pair.names[side]] for pair in pairs]
        tokens, positions, last = _tokenize(tokenizer, prompts, torch.tensor(ids)[:, :5])
        (clean, corrupt), (clean_at, corrupt_at) = tokens.chunk(2), positions.chunk(2)
        if not torch.equal(clean_at, corrupt_at) or not torch.equal(*last.chunk(2)):
            raise ValueError("the tokenizer splits a clean prompt and its corruption differently")
        candidates = [list(dict.fromkeys(a + b)) for a, b in zip(ids[:n_pairs], ids[n_pairs:], strict=True)]
        answers, corrupt_answers = torch.tensor([row[5] for row in ids]).chunk(2)
        data = cls(
            clean_tokens=clean,
            corrupt_tokens=corrupt,
            answers=answers,
            corrupt_answers=corrupt_answers,
            candidates=torch.tensor([row + [-1] * (4 - len(row)) for row in candidates]),
            name_positions=clean_at,
            last_position=last[:n_pairs],
            templates=[pair.template for pair in pairs],
            corruptions=[pair.corruption for pair in pairs],
            clean_text=prompts[:n_pairs],
            corrupt_text=prompts[n_pairs:],
        )
        return data._with_swapped() if symmetric else data

    def __repr__(self) -> str:
        return (
            f"IOIDataset({len(self)} rows of {self.clean_tokens.shape[1]} tokens, "
            f"{len(set(self.templates))} templates, {len(set(self.corruptions))} corruptions)"
        )

    def select(
        self, template: str | Sequence[str] | None = None, corruption: str | Sequence[str] | None = None, **chosen: Any
    ) -> IOIDataset:
        """The rows of one template, of one corruption, or of both; without arguments all rows.

        Raises:
            ValueError: If `template` is not in `TEMPLATES` or `corruption` not in `CORRUPTIONS`, nor in the data.
        """
        found = super().select(**chosen)
        for name, wanted, known in (("template", template, TEMPLATES), ("corruption", corruption, CORRUPTIONS)):
            if wanted is not None:
                listed = _choose(wanted, name, {}, tuple(dict.fromkeys((*known, *self.groups[name]))))
                found = found[[row for row, label in enumerate(found.groups[name]) if label in listed]]
        return found

    def labels_of(self, group: str) -> list:
        """The labels of a group that occur in the data; templates and corruptions in the paper's order."""
        known = {"corruption": CORRUPTIONS, "template": TEMPLATES}.get(group)
        if known is None:
            return super().labels_of(group)
        order = {label: number for number, label in enumerate(known)}
        return sorted(set(self.groups[group]), key=lambda label: (order.get(label, len(order)), label))

    @property
    def clean_names(self) -> Int[Tensor, "B 5"]:
        """Token ids of the five names of each clean prompt, in order."""
        return self.clean_tokens.gather(1, self.name_positions)

    @property
    def corrupt_names(self) -> Int[Tensor, "B 5"]:
        """Token ids of the five names of each corrupt prompt, in order."""
        return self.corrupt_tokens.gather(1, self.name_positions)

    def _with_swapped(self) -> IOIDataset:
        """These rows, then the same rows with clean and corrupt exchanged."""
        return IOIDataset(
            clean_tokens=torch.cat([self.clean_tokens, self.corrupt_tokens]),
            corrupt_tokens=torch.cat([self.corrupt_tokens, self.clean_tokens]),
            answers=torch.cat([self.answers, self.corrupt_answers]),
            corrupt_answers=torch.cat([self.corrupt_answers, self.answers]),
            candidates=self.candidates.repeat(2, 1),
            name_positions=self.name_positions.repeat(2, 1),
            last_position=self.last_position.repeat(2),
            templates=self.templates * 2,
            corruptions=self.corruptions * 2,
            clean_text=self.clean_text + self.corrupt_text,
            corrupt_text=self.corrupt_text + self.clean_text,
        )


def _with_own(given: Any, own: dict[str, Any], made: type) -> Any:
    """The dataset's own marks or groups, and others that were given.

    Raises:
        ValueError: if one that was given is not the dataset's own; those of type ``made`` are its own of before.
    """
    if not isinstance(given, Mapping):
        return given
    for name, column in own.items():
        if name in given and not isinstance(given, made):
            one, other = (value.tolist() if hasattr(value, "tolist") else value for value in (given[name], column))
            if not hasattr(one, "__iter__") or list(one) != list(other):
                source = "name_positions" if isinstance(column, Tensor) else f"{name}s"
                raise ValueError(f"{name!r} is {one!r:.80}, but {source} says {other!r:.80}; give {source} alone")
    return own | {name: value for name, value in given.items() if name not in own}


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], name_ids: Int[Tensor, "B 5"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B 5"], Int[Tensor, "B"]]:
    """Tokens with BOS and right padding, the positions of the names, and the last positions."""
    bos = tokenizer.get_vocab().get(BOS, tokenizer.bos_token_id)
    if bos is None:
        raise ValueError(f"the tokenizer has neither {BOS} nor a BOS token of its own, with which every prompt begins")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), bos)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = 1 + max(len(ids) for ids in encoded)
    tokens = torch.tensor([[bos, *ids] + [pad] * (length - 1 - len(ids)) for ids in encoded])
    is_name = (tokens[:, :, None] == name_ids[:, None, :]).any(dim=2)
    wrong = (is_name.sum(dim=1) != 5).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"under this tokenizer the five names of {texts[wrong[0]]!r} are not five tokens")
    positions = is_name.nonzero()[:, 1].reshape(-1, 5)
    return tokens, positions, torch.tensor([len(ids) for ids in encoded])


def _check_alignment(tokenizer: PreTrainedTokenizerBase, tokens_of: dict[str, int]) -> None:
    """Raise ValueError unless all prompts of the aligned templates have names and last token in place."""
    a, b, c = list(tokens_of)[:3]
    names = [a, b, c, a, b]
    prompts = list(product(ALIGNED_TEMPLATES, PLACES, OBJECTS))
    texts = [_fill(template, names, place, thing) for template, place, thing in prompts]
    name_ids = torch.tensor([tokens_of[name] for name in names]).expand(len(texts), 5)
    _, positions, last = _tokenize(tokenizer, texts, name_ids)
    layouts = [(*row, end) for row, end in zip(positions.tolist(), last.tolist(), strict=True)]
    usual = Counter(layouts).most_common(1)[0][0]
    for (template, place, thing), layout in zip(prompts, layouts, strict=True):
        if layout != usual:
            raise ValueError(
                f"template {TEMPLATES.index(template) + 1} ({template!r}) is not aligned with the others under "
                f"this tokenizer: with {place!r} and {thing!r} its names and last token are at {layout}, "
                f"elsewhere at {usual}; templates='all' needs no alignment"
            )


class _Pair(NamedTuple):
    """What fixes a pair of prompts; `names` holds, clean then corrupt, the five names and the answer."""

    template: str
    corruption: str
    place: str
    object: str
    names: tuple[list[str], list[str]]


def _draw_pair(rng: random.Random, templates: Sequence[str], corruptions: Sequence[str], names: Sequence[str]) -> _Pair:
    template, corruption = choice(rng, templates), choice(rng, corruptions)
    place, thing = choice(rng, PLACES), choice(rng, OBJECTS)
    drawn: list[str] = []
    while len(drawn) < 4:
        name = choice(rng, names)
        if name not in drawn:
            drawn.append(name)
    letters = dict(zip("ABCD", drawn, strict=True))
    clean, corrupt = ([letters[c] for c in side.replace(" ", "")] for side in corruption.split(" -> "))
    return _Pair(template, corruption, place, thing, (clean, corrupt))


def _fill(template: str, names: Sequence[str], place: str, thing: str) -> str:
    for name in names:
        template = template.replace("[NAME]", name, 1)
    return template.replace("[PLACE]", place).replace("[OBJECT]", thing)


def _choose(
    value: str | Sequence[str], kind: str, words: dict[str, tuple[str, ...]], allowed: tuple[str, ...]
) -> tuple[str, ...]:
    """The entries of `allowed` that `value` names: by a word for a group, alone, or in a list."""
    if isinstance(value, str) and value in words:
        return words[value]
    listed = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    unknown = [item for item in listed if item not in allowed]
    if unknown or not listed:
        found = f"unknown {kind} {unknown[0]!r}" if unknown else f"the list of {kind}s is empty"
        raise ValueError(f"{found}; allowed: {', '.join(map(repr, (*words, *allowed)))}")
    return tuple(dict.fromkeys(listed))


def ioi(
    tokenizer: PreTrainedTokenizerBase,
    n_pairs: int,
    seed: int,
    *,
    templates: str | Sequence[str] = "aligned",
    corruptions: str | Sequence[str] = "all",
    symmetric: bool = False,
) -> IOIDataset:
    """The paper's pairs as a task: `IOIDataset.generate` with as many rows as are asked for.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows; if ``symmetric``, an even number.
        seed: of the draw.
        templates: as for `IOIDataset.generate`.
        corruptions: likewise.
        symmetric: draw half of the rows; the other half are those swapped.

    Raises:
        ValueError: as `IOIDataset.generate`; or for an odd number of rows that are to be symmetric.
    """
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric is True or False, not {symmetric!r:.80}")
    if symmetric and n_pairs % 2:
        raise ValueError(f"with symmetric=True half of the rows are the other half swapped: n_pairs={n_pairs} is odd")
    drawn = n_pairs // 2 if symmetric else n_pairs
    chosen: dict[str, Any] = {"templates": templates, "corruptions": corruptions, "symmetric": symmetric}
    return IOIDataset.generate(tokenizer, drawn, seed=seed, **chosen)


TASK = Task(
    name="ioi",
    about="of three names two come again: the third is the one that is given something",
    function=ioi,
    source="arXiv 2407.14008",
    example={
        "clean": "Afterwards Arnold, Ron and Gloria went to the station. Arnold and Ron gave a kiss to",
        "corrupt": "Afterwards Arnold, Ron and Gloria went to the station. Arnold and Gloria gave a kiss to",
        "answer": " Gloria",
        "corrupt_answer": " Ron",
    },
)
