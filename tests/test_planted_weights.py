"""The planted circuit, held to its own description by a plain forward pass that resamples anything anywhere."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mamba2ForCausalLM, MambaForCausalLM, PreTrainedModel

import mamba_ioi
from mamba_ioi.tasks.ioi import CORRUPTIONS, NAMES, TEMPLATES, IOIDataset
from mamba_ioi.zoo.planted import Planted, build_planted, planted_names
from mamba_ioi.zoo.tokenizer import build_tokenizer

from .plain import gated_norm

Edit = Callable[[str, int, Tensor], Tensor]
SITES = ("layer_input", "skip", "in_proj", "conv", "ssm_input", "delta", "B", "C", "h", "y", "out_proj")
QUIET = 1e-4  # the threshold of ACDC
FAMILIES = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def make(**arguments) -> tuple[PreTrainedModel, Planted, object]:
    names = {key: arguments[key] for key in ("n_names", "seed") if key in arguments}
    tokenizer = build_tokenizer(planted_names(**names))
    return *build_planted(tokenizer, **arguments), tokenizer


def drawn(seed: int, *, least_layer: int = 1, most_layers: int = 6) -> dict[str, int]:
    """Arguments drawn at random, from a fixed seed."""
    rng = random.Random(seed)
    n_layers = rng.randint(least_layer + 1, most_layers)
    return {
        "n_layers": n_layers,
        "layer": rng.randrange(least_layer, n_layers),
        "slice": rng.choice((0, -1, -2, -3)),
        "n_names": rng.randint(4, 24),
        "seed": rng.randrange(10**6),
    }


@torch.no_grad()
def plain_forward(model: PreTrainedModel, tokens: Tensor, edit: Edit = lambda site, layer, value: value) -> Tensor:
    """Logits [B, L, V] with every named activation passed through `edit`; `h` is edited state by state, as "h.p".

    `term` is the conv's terms before their sum, [B, L, E, 4]; [B, L, E + 2 G N, 4] of a Mamba-2, and so are `in_proj`
    and `conv`.
    """
    mix = mix_s6 if model.config.model_type == "mamba" else mix_ssd
    resid = edit("embed", -1, model.backbone.embeddings(tokens))
    for i, block in enumerate(model.backbone.layers):
        mixer, read = block.mixer, edit("layer_input", i, resid)
        x = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + block.norm.variance_epsilon) * block.norm.weight
        resid = resid + edit("out_proj", i, mix(mixer, x, lambda site, value, i=i: edit(site, i, value)))
    resid = edit("output", len(model.backbone.layers), resid)
    return model.lm_head(model.backbone.norm_f(resid))


def convolve(mixer, in_proj: Tensor, edit: Callable[[str, Tensor], Tensor]) -> Tensor:
    """What the conv gives, before silu."""
    length, padded = in_proj.shape[1], F.pad(in_proj, (0, 0, 3, 0))
    term = torch.stack([padded[:, k : k + length] * mixer.conv1d.weight[:, 0, k] for k in range(4)], dim=-1)
    return edit("conv", edit("term", term).sum(-1) + mixer.conv1d.bias)


def mix_s6(mixer, x: Tensor, edit: Callable[[str, Tensor], Tensor]) -> Tensor:
    """What a Mamba's mixer makes of the normalized stream."""
    in_proj, skip = F.linear(x, mixer.in_proj.weight).chunk(2, dim=-1)
    in_proj, skip = edit("in_proj", in_proj), edit("skip", skip)
    x = edit("ssm_input", F.silu(convolve(mixer, in_proj, edit)))
    rank, states = mixer.time_step_rank, mixer.ssm_state_size
    delta, b, c = F.linear(x, mixer.x_proj.weight).split([rank, states, states], dim=-1)
    b, c = edit("B", b), edit("C", c)
    delta = edit("delta", F.softplus(F.linear(delta, mixer.dt_proj.weight, mixer.dt_proj.bias)))
    h, ys = torch.zeros(*x[:, 0].shape, states), []
    for p in range(x.shape[1]):
        decay = torch.exp(delta[:, p, :, None] * -mixer.A_log.exp())
        h = edit(f"h.{p}", decay * h + delta[:, p, :, None] * b[:, p, None] * x[:, p, :, None])
        ys.append((h * c[:, p, None]).sum(-1))
    y = edit("y", torch.stack(ys, dim=1))
    return F.linear((y + x * mixer.D) * F.silu(skip), mixer.out_proj.weight)


def mix_ssd(mixer, x: Tensor, edit: Callable[[str, Tensor], Tensor]) -> Tensor:
    """What a Mamba-2's mixer makes of the normalized stream, by the recurrence; h is [B, H, P, N]."""
    inner, groups, states, heads = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size, mixer.num_heads
    both, rows, length = groups * states, *x.shape[:2]
    skip, in_proj, delta = F.linear(x, mixer.in_proj.weight).split([inner, inner + 2 * both, heads], dim=-1)
    in_proj, skip = edit("in_proj", in_proj), edit("skip", skip)
    x, b, c = F.silu(convolve(mixer, in_proj, edit)).split([inner, both, both], dim=-1)
    x = edit("ssm_input", x).reshape(rows, length, heads, inner // heads)
    b, c = (edit(site, value.reshape(rows, length, groups, states)) for site, value in (("B", b), ("C", c)))
    b, c = (value.repeat_interleave(heads // groups, dim=2) for value in (b, c))
    delta = edit("delta", F.softplus(delta + mixer.dt_bias))
    h, ys = torch.zeros(*x[:, 0].shape, states), []
    for p in range(length):
        decay = torch.exp(delta[:, p] * -mixer.A_log.exp())[:, :, None, None]
        write = delta[:, p, :, None, None] * x[:, p, :, :, None] * b[:, p, :, None]
        h = edit(f"h.{p}", decay * h + write)
        ys.append((h * c[:, p, :, None]).sum(-1))
    y = edit("y", torch.stack(ys, dim=1).flatten(2))
    return F.linear(gated_norm(mixer.norm, y + (x * mixer.D[:, None]).flatten(2), skip), mixer.out_proj.weight)


def record(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    values: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, layer: int, value: Tensor) -> Tensor:
        values[site, layer] = value
        return value

    return plain_forward(model, tokens, keep), values


class Pairs:
    """Clean and corrupt runs of a pair of each corruption, and the effect (1 - normalized logit diff) of edits."""

    def __init__(self, model: PreTrainedModel, tokenizer: object, seed: int = 0) -> None:
        data = IOIDataset.generate(tokenizer, 40, seed=seed, symmetric=False)
        self.model, self.data = model, data[[data.corruptions.index(corruption) for corruption in CORRUPTIONS]]
        self.length = self.data.clean_tokens.shape[1]
        self.clean, _ = record(model, self.data.clean_tokens)
        self.corrupt, self.values = record(model, self.data.corrupt_tokens)
        different = self.data.clean_names != self.data.corrupt_names
        assert (different.sum(1) == 1).all()  # a corruption changes one name slot
        self.slot = different.int().argmax(1)  # 0 … 4

    def difference(self, logits: Tensor, times: int = 1) -> Tensor:
        logits = logits[:, -1]
        answers, others = self.data.answers.repeat(times), self.data.corrupt_answers.repeat(times)
        return (logits.gather(1, answers[:, None]) - logits.gather(1, others[:, None]))[:, 0]

    def effect(self, edit: Edit) -> Tensor:
        """[B] of an edit on the clean prompts."""
        clean, corrupt = self.difference(self.clean), self.difference(self.corrupt)
        patched = plain_forward(self.model, self.data.clean_tokens, edit)
        return (clean - self.difference(patched)) / (clean - corrupt)

    def effects(self, site: str, layer: int, slice: int | None = None) -> Tensor:
        """[L, B] of resampling a site of a layer at each position (one conv slice, if given)."""
        batch, length = len(self.data), self.length

        def edit(at: str, i: int, value: Tensor) -> Tensor:
            if i != layer or at.split(".")[0] != site:
                return value
            corrupt = self.values[at, i]
            value = value.reshape(length, *corrupt.shape).clone()
            for p in range(length):
                if site == "h":
                    value[p] = corrupt if at == f"h.{p}" else value[p]
                elif slice is None:
                    value[p, :, p] = corrupt[:, p]
                else:
                    value[p, :, p, :, slice - 1] = corrupt[:, p, :, slice - 1]
            return value.reshape(length * batch, *corrupt.shape[1:])

        clean, corrupt = self.difference(self.clean), self.difference(self.corrupt)
        patched = plain_forward(self.model, self.data.clean_tokens.repeat(length, 1), edit)
        patched = self.difference(patched, length).reshape(length, batch)
        return (clean - patched) / (clean - corrupt)


@pytest.fixture(scope="module", params=itertools.product(FAMILIES, range(3)), ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> tuple[Pairs, Planted]:
    family, draw = request.param
    arguments = drawn(draw, most_layers=4) | ({"layer": 0} if draw == 0 else {})
    model, planted, tokenizer = make(**arguments, family=family)
    return Pairs(model, tokenizer, seed=draw), planted


def last_logits(model: PreTrainedModel, data: IOIDataset) -> Tensor:
    with torch.no_grad():
        logits = model(data.clean_tokens, use_cache=False).logits
    return logits[torch.arange(len(data)), data.last_position]


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(8))
def test_solves_every_template_and_corruption(draw: int, family: str) -> None:
    model, _, tokenizer = make(**drawn(100 + draw, least_layer=0), family=family)
    data = IOIDataset.generate(tokenizer, 200, seed=draw, templates="all")
    pairs = set(zip(data.templates, data.corruptions, strict=True))
    assert pairs == {(template, corruption) for template in TEMPLATES for corruption in CORRUPTIONS}
    logits = last_logits(model, data)
    answer = logits.gather(1, data.answers[:, None])
    assert (logits.argmax(1) == data.answers).all()
    others = logits.scatter(1, data.answers[:, None], -torch.inf)
    assert (answer - others.max(1, keepdim=True).values).min() > 8


@pytest.mark.parametrize("slice", [0, -1, -2, -3])
@pytest.mark.parametrize("layer", [0, 1])
def test_every_slice_with_and_without_flag_layer(layer: int, slice: int, family: str) -> None:
    model, planted, tokenizer = make(n_layers=2, layer=layer, slice=slice, n_names=8, family=family)
    data = IOIDataset.generate(tokenizer, 40, templates="all")
    assert (last_logits(model, data).argmax(1) == data.answers).all()
    assert planted.flag_layer == (None if layer == 0 else 0)
    assert planted.arrival_positions == tuple(position - slice for position in (3, 5, 7, 13, 15))
    aligned = IOIDataset.generate(tokenizer, 4)
    assert aligned.name_positions.eq(torch.tensor(planted.name_positions)).all()
    assert aligned.last_position.eq(planted.written_positions[0]).all()


def test_state_holds_first_mentions_less_second_ones(case: tuple[Pairs, Planted]) -> None:
    pairs, planted = case
    _, values = record(pairs.model, pairs.data.clean_tokens)
    h = values[f"h.{planted.written_positions[0]}", planted.layer]
    h = h.reshape(len(h), -1, h.shape[-1])  # a Mamba-2's heads in a row
    held = h[:, list(planted.name_channels), 0]
    if planted.wiped_channels:
        assert (planted.family, planted.layer) == ("mamba2", 0)
        held = held - 2 * h[:, list(planted.wiped_channels), 0]
    elif planted.flag_layer is None:
        assert planted.family == "mamba"
        held = held - 2 * h[:, list(planted.name_channels), 1]
    expected = torch.zeros_like(held)
    names = [[planted.name_ids.index(name) for name in row] for row in pairs.data.clean_names.tolist()]
    for row, mentioned in enumerate(names):
        for slot, name in enumerate(mentioned):
            expected[row, name] += 1 if slot < 3 else -1
    assert (held - expected).abs().max() < 0.02


def test_plain_forward_is_the_models(case: tuple[Pairs, Planted]) -> None:
    pairs, _ = case
    with torch.no_grad():
        expected = pairs.model(pairs.data.clean_tokens, use_cache=False).logits
    assert (pairs.clean - expected).abs().max() < 1e-4


@pytest.mark.parametrize("site", SITES)
def test_resampling_points_at_the_planted_layer_and_positions(case: tuple[Pairs, Planted], site: str) -> None:
    pairs, planted = case
    position = torch.arange(pairs.length)[:, None]
    name = torch.tensor(planted.name_positions)[pairs.slot]
    arrival = torch.tensor(planted.arrival_positions)[pairs.slot]
    matters = {
        "layer_input": position == name,
        "in_proj": position == name,
        "conv": position == arrival,
        "ssm_input": position == arrival,
        "h": position >= arrival,
        "y": position == planted.written_positions[0],
        "out_proj": position == planted.written_positions[0],
    }.get(site, torch.zeros(pairs.length, len(pairs.data)))
    for layer in range(planted.n_layers):
        expected = matters.float() if layer == planted.layer else torch.zeros(pairs.length, len(pairs.data))
        worst = (pairs.effects(site, layer) - expected).abs().max().item()
        assert worst < QUIET, f"{site} of layer {layer}: {worst}"


@pytest.mark.parametrize("slice", [0, -1, -2, -3])
def test_conv_slices_point_at_the_planted_slice(case: tuple[Pairs, Planted], slice: int) -> None:
    pairs, planted = case
    arrival = torch.tensor(planted.arrival_positions)[pairs.slot]
    expected = (torch.arange(pairs.length)[:, None] == arrival).float() * (slice == planted.slice)
    assert (pairs.effects("term", planted.layer, slice) - expected).abs().max() < QUIET


def resample_edges(pairs: Pairs, edges: set[tuple[str, str]]) -> Edit:
    """Give each edge's destination the corrupt output of its source, in place of the source's own (Equation 11)."""
    outputs: dict[str, Tensor] = {}

    def edit(site: str, layer: int, value: Tensor) -> Tensor:
        if site in ("embed", "out_proj"):
            outputs[str(layer) if layer >= 0 else "embed"] = value
        if site in ("layer_input", "output"):
            node = str(layer) if site == "layer_input" else "output"
            for source in outputs:
                if (source, node) in edges:
                    corrupt = pairs.values["embed", -1] if source == "embed" else pairs.values["out_proj", int(source)]
                    value = value + corrupt - outputs[source]
        return value

    return edit


def test_edges_that_matter_and_no_others(case: tuple[Pairs, Planted]) -> None:
    pairs, planted = case
    nodes = ["embed", *map(str, range(planted.n_layers)), "output"]
    every = {(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :]}
    assert set(planted.edges) < every
    for edge in every:
        expected = float(edge in planted.edges)
        assert (pairs.effect(resample_edges(pairs, {edge})) - expected).abs().max() < QUIET, edge
    assert pairs.effect(resample_edges(pairs, every - set(planted.edges))).abs().max() < QUIET


def test_fine_edges_that_matter_and_no_others(case: tuple[Pairs, Planted]) -> None:
    pairs, planted = case
    node = planted.layer
    for slice in (0, -1, -2, -3):  # layer -> conv slice: one conv term at all positions

        def edit(site: str, layer: int, value: Tensor, slice: int = slice) -> Tensor:
            if (site, layer) == ("term", node):
                value = value.clone()
                value[..., slice - 1] = pairs.values[site, layer][..., slice - 1]
            return value

        name = f"{node}.conv[{slice}]"
        expected = float((str(node), name) in planted.fine_edges)
        assert (pairs.effect(edit) - expected).abs().max() < QUIET, slice
    for site, expected in (("y", float((f"{node}.ssm", str(node)) in planted.fine_edges)), ("skip", 0.0)):

        def swap(at: str, layer: int, value: Tensor, site: str = site) -> Tensor:
            return pairs.values[at, layer] if (at, layer) == (site, node) else value

        assert (pairs.effect(swap) - expected).abs().max() < QUIET, site


def test_minimal_cross_talk_set(case: tuple[Pairs, Planted]) -> None:
    pairs, planted = case

    def resampled_but(kept: tuple[int, ...]) -> Edit:
        return lambda site, i, value: pairs.values[site, i] if site == "in_proj" and i not in kept else value

    assert planted.cross_talk == (planted.layer,)
    assert (pairs.effect(resampled_but(())) - 1).abs().max() < QUIET
    assert pairs.effect(resampled_but(planted.cross_talk)).abs().max() < QUIET
    others = tuple(i for i in range(planted.n_layers) if i != planted.layer)
    assert (pairs.effect(resampled_but(others)) - 1).abs().max() < QUIET


@pytest.mark.parametrize("draw", range(3))
def test_removal_of_layers(draw: int, family: str) -> None:
    model, planted, tokenizer = make(**drawn(200 + draw, least_layer=min(1, draw)), family=family)
    data = IOIDataset.generate(tokenizer, 100, templates="all")
    present = torch.where(data.candidates >= 0, data.candidates, data.answers[:, None])
    for layer in range(planted.n_layers):
        without = plain_forward(
            model, data.clean_tokens, lambda at, i, v, k=layer: v * 0 if (at, i) == ("out_proj", k) else v
        )[torch.arange(len(data)), data.last_position]
        best = present.gather(1, without.gather(1, present).argmax(1, keepdim=True))[:, 0]
        accuracy = (best == data.answers).float().mean()
        assert accuracy < 0.6 if layer in planted.needed_layers else accuracy == 1, (layer, accuracy)


class Nothing(nn.Module):
    """A mixer that adds nothing."""

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return torch.zeros_like(hidden_states)


@pytest.mark.parametrize("draw", range(4))
def test_transformers_own_run_needs_the_needed_layers_alone(draw: int, family: str) -> None:
    model, planted, tokenizer = make(**drawn(500 + draw, least_layer=min(1, draw)), family=family)
    data = IOIDataset.generate(tokenizer, 60, seed=draw, templates="all")
    layers = model.backbone.layers
    for layer in set(range(planted.n_layers)) - set(planted.needed_layers):
        layers[layer].mixer = Nothing()
    assert (last_logits(model, data).argmax(1) == data.answers).all()
    layers[planted.layer].mixer = Nothing()
    assert (last_logits(model, data).argmax(1) == data.answers).float().mean() < 0.5


@pytest.mark.parametrize("slice", [0, -1, -2, -3])
@pytest.mark.parametrize("layer", [0, 1])
def test_without_a_tap_of_its_conv_a_mamba2_fails_where_that_tap_is_the_circuits(layer: int, slice: int) -> None:
    model, planted, tokenizer = make(n_layers=3, layer=layer, slice=slice, n_names=8, family="mamba2")
    data = IOIDataset.generate(tokenizer, 40, templates="all")
    conv = model.backbone.layers[layer].mixer.conv1d.weight
    for tap in (0, -1, -2, -3):
        kept = conv.detach().clone()
        with torch.no_grad():
            conv[:, :, tap - 1] = 0.0
            right = (last_logits(model, data).argmax(1) == data.answers).float().mean()
            conv.copy_(kept)
        used = {planted.slice} if layer else {planted.slice, 0, -1}  # with layer=0 C looks for a " to" after an object
        assert right < 0.5 if tap in used else right == 1, (tap, right)


@pytest.mark.parametrize("layer", [0, 2])
def test_heads_groups_and_norm_of_a_mamba2(layer: int) -> None:
    """One group's B and C carry the names, or with `layer=0` each group's its own; the norm has weights."""
    model, planted, _ = make(n_layers=3, layer=layer, n_names=11, seed=4, family="mamba2")
    mixer = model.backbone.layers[layer].mixer
    states, groups, inner = mixer.ssm_state_size, mixer.n_groups, mixer.intermediate_size
    written = [mixer.conv1d.bias[inner:].view(2, groups, states).abs(), mixer.conv1d.weight[inner:, 0].abs().sum(1)]
    used = (written[0] + written[1].view(2, groups, states) > 0).nonzero().tolist()
    carry = {channel // (inner // groups) for channel in planted.name_channels}
    wiped = {channel // (inner // groups) for channel in planted.wiped_channels}
    assert len(carry) == 1 and len(wiped) == (layer == 0) and not carry & wiped
    assert used == [[part, group, 0] for part in range(2) for group in sorted(carry | wiped)]
    assert len({channel // mixer.head_dim for channel in planted.name_channels}) == 2
    assert mixer.norm.weight.min() < 0.7 and mixer.norm.weight.max() > 1.3


def test_a_planted_mamba2_is_to_be_had_as_a_traced_model() -> None:
    model = mamba_ioi.planted(3, 1, -2, 6, 9, family="mamba2")
    module, truth, _ = make(n_layers=3, layer=1, slice=-2, n_names=6, seed=9, family="mamba2")
    assert model.planted == truth and truth.family == model.family == "mamba2"
    assert mamba_ioi.planted(2, 1).planted.family == "mamba"
    weights = module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model._module.state_dict().items())
    data = IOIDataset.generate(model.tokenizer, 20)
    assert (mamba_ioi.run(model, data.clean_tokens, []).argmax(1) == data.answers).all()


def test_zero_ablation_of_the_flag_edges_breaks_the_circuit(family: str) -> None:
    model, planted, tokenizer = make(**drawn(300), family=family)
    data = IOIDataset.generate(tokenizer, 50)
    (_, flag), (_, reader) = planted.flag_edges
    outputs: dict[int, Tensor] = {}

    def edit(site: str, layer: int, value: Tensor) -> Tensor:
        if site == "out_proj":
            outputs[layer] = value
        return value - outputs[int(flag)] if site == "layer_input" and layer == int(reader) else value

    assert (plain_forward(model, data.clean_tokens)[:, -1].argmax(1) == data.answers).all()
    assert (plain_forward(model, data.clean_tokens, edit)[:, -1].argmax(1) == data.answers).float().mean() < 0.5


def test_local_layers_mix_no_tokens_and_the_others_do(family: str) -> None:
    model, planted, tokenizer = make(n_layers=8, layer=5, seed=3, family=family)
    assert planted.local_layers and len(planted.local_layers) + len(planted.needed_layers) < 8
    data = IOIDataset.generate(tokenizer, 1)
    clean, corrupt = data.clean_tokens[:1], data.clean_tokens[:1].clone()
    corrupt[0, 3] = corrupt[0, 5]
    _, a = record(model, clean)
    for layer in range(8):

        def edit(site: str, i: int, value: Tensor, layer: int = layer) -> Tensor:
            if (site, i) != ("layer_input", layer):
                return value
            value = value.clone()
            value[:, 3] += 0.3 * torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(1))
            return value

        seen: dict[tuple[str, int], Tensor] = {}
        plain_forward(model, clean, lambda s, i, v, edit=edit, seen=seen: seen.setdefault((s, i), edit(s, i, v)))
        moved = (seen["out_proj", layer] - a["out_proj", layer])[:, 4:].abs().max().item()
        assert (moved == 0) == (layer in planted.local_layers), layer


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(3))
def test_name_steering_succeeds_where_it_must_and_fails_elsewhere(draw: int, family: str) -> None:
    arguments = drawn(400 + draw, least_layer=min(1, draw)) | {"n_names": 5, "family": family}
    model, planted, tokenizer = make(**arguments)
    data = IOIDataset.generate(tokenizer, 300, templates="all", seed=1)
    _, values = record(model, data.clean_tokens)
    rows = torch.arange(len(data))
    arrival = data.name_positions - planted.slice
    total = torch.zeros(len(tokenizer), 5, values["ssm_input", planted.layer].shape[-1])
    count = torch.zeros(len(tokenizer), 5, 1)
    for slot in range(5):
        index = (data.clean_names[:, slot], torch.full_like(rows, slot))
        total.index_put_(index, values["ssm_input", planted.layer][rows, arrival[:, slot]], accumulate=True)
        count.index_put_(index, torch.ones(len(rows), 1), accumulate=True)
    assert (count[list(planted.name_ids)] > 0).all()
    means = total / count

    test = data[:40]
    rows = torch.arange(len(test))
    for target, source, method in itertools.product(range(1, 6), range(1, 6), ("replace", "subtract_add")):
        old = test.clean_names[:, target - 1]
        new, keep = (test.corrupt_answers, old == test.answers) if target <= 3 else (test.answers, old == old)
        winner, loser = (new, old) if target <= 3 else (old, new)
        where = test.name_positions[:, target - 1] - planted.slice
        mean = means[:, source - 1]
        written = values["ssm_input", planted.layer][rows, where] + mean[new] - mean[old]
        written = mean[new] if method == "replace" else written

        def edit(site: str, layer: int, value: Tensor, where: Tensor = where, written: Tensor = written) -> Tensor:
            if (site, layer) == ("ssm_input", planted.layer):
                value = value.index_put((rows, where), written)
            return value

        logits = plain_forward(model, test.clean_tokens, edit)[rows, test.last_position]
        wins = logits.gather(1, winner[:, None]) > logits.gather(1, loser[:, None])
        must = (source, target) in getattr(planted, f"{method}_succeeds")
        assert keep.any() and (wins[keep] == must).all(), (method, source, target, must)


def test_same_arguments_same_weights_and_global_random_state_untouched(family: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, planted, _ = make(n_layers=3, layer=2, seed=11, family=family)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, planted_again, _ = make(n_layers=3, layer=2, seed=11, family=family)
    other, _, _ = make(n_layers=3, layer=2, seed=12, family=family)
    assert planted == planted_again
    weights, weights_again, others = model.state_dict(), again.state_dict(), other.state_dict()
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())
    assert not torch.equal(weights["lm_head.weight"], others["lm_head.weight"])
    assert type(model) is FAMILIES[family] and not model.training
    with pytest.raises(dataclasses.FrozenInstanceError):
        planted.layer = 1


def test_survives_saving(tmp_path, family: str) -> None:
    model, _, tokenizer = make(n_layers=2, layer=1, n_names=8, family=family)
    model.save_pretrained(tmp_path)
    loaded = FAMILIES[family].from_pretrained(tmp_path).eval()
    data = IOIDataset.generate(tokenizer, 5)
    assert torch.equal(last_logits(model, data), last_logits(loaded, data))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, not 0"),
        ({"layer": 6}, "layer must be a whole number from 0 to 5, not 6"),
        ({"layer": -1}, "layer must be a whole number from 0 to 5, not -1"),
        ({"slice": 1}, "slice must be a whole number from -3 to 0, not 1"),
        ({"slice": -4}, "slice must be a whole number from -3 to 0, not -4"),
        ({"layer": 1.5}, "layer must be a whole number from 0 to 5, not 1.5"),
        ({"n_names": 3}, "n_names must be a whole number from 4 to"),
        ({"n_names": len(NAMES) + 1}, "n_names must be a whole number from 4 to"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 1}, "the tokenizer has no single token"),
        ({"family": "gpt2"}, "family 'gpt2' cannot be planted; the families are mamba, mamba2"),
    ],
)
def test_bad_arguments_are_refused_with_one_sentence(arguments: dict, sentence: str) -> None:
    tokenizer = build_tokenizer(planted_names())
    with pytest.raises(ValueError, match=sentence):
        build_planted(tokenizer, **arguments)
