"""Where a causal language model keeps its blocks and its unembedding, and whether its residual stream is all there is.

What experiments on any model do to it is: give a block another input, leave a block out, and unembed the positions that
are read alone. `stream_differences` does that to a prompt and compares with the untouched model, so that a model of
which it is not true is refused, not measured wrongly.

What runs in a trace uses torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .location import gives_output, logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORMS = ("norm_f", "ln_f", "norm", "final_layernorm", "final_layer_norm", "final_norm", "layer_norm", "ln_out")
"""What the norm before the unembedding is called."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model.

    Attributes:
        blocks: the path of the list of blocks.
        head: the path of the unembedding.
        embed: the path of the token embeddings.
        norm: the path of the norm before the unembedding; empty where none is known.
        scale: what the model multiplies the token embeddings by.
        tuples: for each block, the length of the tuple it returns, which begins with the residual stream; 0 if it
            returns that alone.
        plain: whether the unembedding gives the logits of the model's output, but for rounding.
        checked: whether `stream_differences` was looked at.
        broken: why blocks cannot be left out and their inputs cannot be changed, or None.
        beside: why a block's input is not all that it reads of the prompt, or None.
    """

    blocks: str
    head: str
    embed: str = ""
    norm: str = ""
    scale: float = 1.0
    tuples: tuple[int, ...] = ()
    plain: bool = False
    checked: bool = False
    broken: str | None = None
    beside: str | None = None

    def judged(self, name: str, differences: Mapping[str, float], tolerance: float) -> Anatomy:
        """The same with what `stream_differences` found, where ``tolerance`` is what may differ."""
        tuples = tuple(int(value) for key, value in differences.items() if key.startswith("tuple."))
        wrong = [key for key, value in differences.items() if not value <= tolerance]
        begins, reads = (
            sorted(int(key.split(".")[1]) for key in wrong if key.startswith(kind)) for kind in ("begins.", "reads.")
        )
        broken = beside = None
        if begins:
            broken = f"layer {begins[0]} of {name} does not begin with what layer {begins[0] - 1} gives"
        elif "logits" in wrong:
            broken = f"the logits of {name} do not follow from what its last layer gives at the same position"
        if reads:
            layers = f"layer{'s' * (len(reads) > 1)} {', '.join(map(str, reads))}"
            beside = f"{layers} of {name} read{'s' * (len(reads) == 1)} more of the prompt than the residual stream"
        plain = differences["head"] < 1e-6
        return replace(self, tuples=tuples, plain=plain, checked=True, broken=broken, beside=beside)


def find_anatomy(module: PreTrainedModel) -> list[Anatomy]:
    """What may be the parts of a model: its lists of as many modules as it has layers, the outermost first."""
    n_layers = getattr(module.config.get_text_config(), "num_hidden_layers", None)
    unembedding = module.get_output_embeddings()
    parts = list(module.named_modules())
    head = next((path for path, part in parts if unembedding is not None and part is unembedding), "")
    lists = [path for path, part in parts if isinstance(part, nn.ModuleList) and len(part) == n_layers]
    if head and lists:
        embedding = module.get_input_embeddings()
        embed = next((path for path, part in parts if part is embedding), "")
        found = sorted(lists, key=lambda path: path.count("."))
        scale = float(getattr(dict(parts).get(embed.rpartition(".")[0]), "embedding_multiplier", 1.0))
        return [Anatomy(blocks, head, embed, _norm_beside(blocks, parts), scale) for blocks in found]
    lacks = "an unembedding" if lists else "a list of its layers"
    broken = f"a {type(module).__name__} has no module that is {lacks}"
    return [Anatomy(lists[0] if lists else "", head, checked=True, broken=broken)]


def _norm_beside(blocks: str, parts: Iterable[tuple[str, nn.Module]]) -> str:
    """The path of the final norm, which every known model has beside its blocks."""
    above = blocks.rpartition(".")[0]
    paths = {path for path, _ in parts}
    beside = (f"{above}.{name}" if above else name for name in FINAL_NORMS)
    return next((path for path in beside if path in paths), "")


def short_prompt(model, length: int, shift: int = 0) -> Int[Tensor, "B L"]:
    """A short prompt of tokens from all over the vocabulary, for the checks at load."""
    return (torch.arange(1, length + 1, device=model.device).mul(7919) + shift).remainder(model.vocab_size)[None]


def stream_differences(model) -> dict[str, Tensor]:
    """How far the model is from its residual stream being all that passes from block to block and to the logits.

    A short prompt runs, and then another one, in which every other block is given the input that it had in the first,
    and the unembedding the last position alone, of what the last block gave there in the first.

    Returns:
        Relative to the largest value there: ``begins.i``, block i's input from block i - 1's output; ``reads.i``, block
        i's output on the input of the first run, but in the second, from that in the first; ``logits``, likewise;
        ``head``, logits from what the unembedding gave. And ``tuple.i``: the length of the tuple that block i
        returns, or 0.
    """
    length = 6
    first, second = (short_prompt(model, length, shift) for shift in (0, 1))
    with torch.no_grad(), model.trace(first):
        plain = followed(model, None).save()  # pyright: ignore[reportAttributeAccessIssue]
    found = {}
    for begin in range(2):
        given = range(begin, model.n_layers, 2)
        with torch.no_grad(), model.trace(second):
            other = followed(model, plain, given, probe=begin == 1).save()  # pyright: ignore[reportAttributeAccessIssue]
        found |= {f"reads.{i}": relative_difference(other[f"output.{i}"], plain[f"output.{i}"]) for i in given}
        if begin == 0:
            found["logits"] = relative_difference(other["logits"], plain["logits"][:, -1:])
        else:
            found["head"] = relative_difference(other["logits"], other["head"])
    for i in range(1, model.n_layers):
        found[f"begins.{i}"] = relative_difference(plain[f"input.{i}"], plain[f"output.{i - 1}"])
    return found | {f"tuple.{i}": plain[f"tuple.{i}"].double() for i in range(model.n_layers)}


def followed(model, plain: dict[str, Tensor] | None, given: Iterable[int] = (), probe: bool = False) -> Any:
    """The body of a trace: each block's input and output, and the logits.

    With a plain run, the blocks of ``given`` have its inputs (and its embeddings, where they are given them), and the
    logits are those at its last position. With
    ``probe``, the unembedding gives ``head``, numbers far apart, and the logits are what becomes of them.
    """
    found = {}
    for i in range(model.n_layers):
        block = model.layers[i]
        if plain is not None and i in given:
            if given_embeddings(block):
                args, kwargs = block.inputs
                block.inputs = (plain[f"input.{i}"], plain[f"beside.{i}"], *args[2:]), kwargs
            else:
                block.input = plain[f"input.{i}"]
        found[f"input.{i}"] = block.input.clone()
        if given_embeddings(block):
            found[f"beside.{i}"] = block.inputs[0][1].clone()
        output = block.output
        found[f"output.{i}"] = stream_of(output).clone()
        found[f"tuple.{i}"] = torch.tensor(len(output) if isinstance(output, tuple) else 0)
    if plain is not None:
        last = plain[f"output.{model.n_layers - 1}"]
        put_output(model.layers[model.n_layers - 1], last[:, -1:].expand_as(last))
        cut_head(model)
    if probe:
        head = model.unembedding.output
        head = torch.linspace(-1e4, 1e4, head.shape[-1]).to(head).expand_as(head)
        model.unembedding.output = found["head"] = head
    found["logits"] = logits_of(model.output)
    return found


def given_embeddings(block) -> bool:
    """Whether a block is given the embeddings beside the stream, as its second argument."""
    return getattr(type(block), "given_embeddings", False)


def stream_of(output) -> Tensor:
    """The residual stream after a block, of what the block returns."""
    return output[0] if isinstance(output, tuple) else output


def first_of(inputs: tuple[tuple, dict]) -> Tensor:
    """The first argument of a call."""
    args, kwargs = inputs
    return args[0] if args else next(iter(kwargs.values()))


def with_first(inputs: tuple[tuple, dict], value: Tensor) -> tuple[tuple, dict]:
    """The same call with another first argument."""
    args, kwargs = inputs
    return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): value})


def with_stream(output: Any, value: Tensor) -> Any:
    """What a module returns, with another tensor in the first place."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def put_output(block, value: Tensor) -> None:
    """Put another residual stream in place of the one after a block, in a trace."""
    output = block.output
    value = value.to(stream_of(output).dtype)
    block.output = (value, *output[1:]) if isinstance(output, tuple) else value


def skip_block(model, layer: int, value: Tensor) -> None:
    """Run a block not; ``value`` is the residual stream after it."""
    length = model.anatomy.tuples[layer] if model.anatomy.checked else 0  # of scans alone, which need no check, none is
    model.layers[layer].skip((value, *[None] * (length - 1)) if length else value)


def cut_head(model, read: Int[Tensor, "B"] | None = None) -> None:
    """Unembed one position of each row alone: ``read``, or the first where all are alike."""
    head = model.unembedding
    value = head.input
    rows = torch.arange(len(value), device=value.device)
    head.input = value[rows, 0 if read is None else read.to(value.device)].unsqueeze(1)  # in one piece, as one product


def output_logits(model) -> Tensor:
    """The logits of the model's output, in a trace."""
    return model.unembedding.output if gives_output(model) else logits_of(model.output)


def relative_difference(value: Tensor, expected: Tensor) -> Tensor:
    """The largest difference, relative to the largest expected value; NaN if one is not finite or shapes differ."""
    if value.shape != expected.shape:
        return torch.tensor(float("nan"))
    value, expected = value.double(), expected.double()
    return (value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
