"""Every family of models with selective scans, site by site, against the recurrence by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from nnsight.modeling.huggingface import _ID_CACHE
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from mamba_ioi import IOIDataset, Patch, cache, generate, load_model, run
from mamba_ioi.circuits import Graph, eap, exact_effects
from mamba_ioi.interventions.patch import Resample, resolve
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import CausalLM, MambaModel, wrap
from mamba_ioi.remote import ndif
from mamba_ioi.trace.sites import SiteInfo, owner

from . import plain_circuits
from .conftest import randomized
from .plain import NAMES, forward_by_hand, prompt_tokenizer
from .test_remote import Worker

TOKENIZER = prompt_tokenizer(NAMES)
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "state_size": 4,
    "tie_word_embeddings": False,
}
S6, EPSILON = {"time_step_rank": 3}, {"mixer_rms_eps": 0.02}
SSD = {"num_heads": 6, "head_dim": 4, "n_groups": 2, "chunk_size": 3, "time_step_limit": (0.5, 2.0)}  # both ends bite
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "mamba": lambda **more: MambaForCausalLM(MambaConfig(**SIZES | S6 | more)),
    "falcon_mamba": lambda **more: FalconMambaForCausalLM(FalconMambaConfig(**SIZES | S6 | EPSILON | more)),
    "mamba2": lambda **more: Mamba2ForCausalLM(Mamba2Config(**SIZES | SSD | more)),
}
LAYER = 1
EDITED = ("in_proj", "ssm_input", "delta_1", "B", "C", "delta_2", "B_bar", "write", "h", "out_proj")
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def build(family: str, seed: int = 3, **more) -> PreTrainedModel:
    """Random weights; x_proj's are so small that norms after it, and their epsilon, matter."""
    module = randomized(FAMILIES[family](**more), seed)
    if family == "falcon_mamba":
        with torch.no_grad():
            for block in module.backbone.layers:
                block.mixer.x_proj.weight *= 0.2
    return module


MODELS = {family: wrap(build(family), TOKENIZER, model_id=family) for family in FAMILIES}
TABLES = {family: model.known_sites() for family, model in MODELS.items()}


def sites_where(wanted: Callable[[str, SiteInfo], bool] = lambda name, site: True) -> pytest.MarkDecorator:
    """Every family with each of its sites of which something is true."""
    cases = [(family, name) for family, table in TABLES.items() for name, site in table.items() if wanted(name, site)]
    return pytest.mark.parametrize(("model", "name"), cases, indirect=["model"])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> MambaModel:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def exact(model) -> PreTrainedModel:
    """The same weights in float64, for forwards by hand."""
    return copy.deepcopy(model._module).double()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, len(TOKENIZER), (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 2, seed=27)


def layer_of(name: str) -> int | None:
    return None if name in ("embed", "norm", "logits") else LAYER


def key_of(name: str) -> str:
    return f"hook_{name}" if layer_of(name) is None else f"blocks.{LAYER}.hook_{name}"


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value.double(), expected.double(), rtol=2e-4, atol=2e-5)


def put(name: str, value: Tensor, positions: list[int] | None) -> dict:
    """What `forward_by_hand` takes to have the value at a site at some positions."""
    if name == "h":
        return {(name, LAYER): lambda h, t: value[:, positions.index(t)] if t in positions else h}

    def change(there: Tensor) -> Tensor:
        if positions is None:
            return value.expand_as(there)
        there = there.clone()
        there[:, positions] = value
        return there

    return {(name, layer_of(name)): change}


@pytest.mark.conformance("logits")
def test_what_a_model_says_of_itself(model, ids):
    assert model.family == model._module.config.model_type
    ssd = model.family == "mamba2"
    assert model.layer_kinds == ["mamba2" if ssd else "mamba"] * 3
    own = {"H": 6, "P": 4, "G": 2, "X": 40} if ssd else {"R": 3}
    assert model.sizes() == {"D": 12, "E": 24, "N": 4, "K": 4, "V": len(TOKENIZER)} | own
    names = "resid_pre layer_input normalized_input in_proj skip conv_slice conv ssm_input delta_1 B C A delta_2 delta "
    names += "A_bar B_bar write h_start h y ssm_output after_skip out_proj resid_post"
    assert model.sites_of(1) == [name for name in names.split() if not (ssd and name == "delta_1")]
    with pytest.raises(ValueError, match="from 0 to 2, not 3"):
        model.sites_of(3)
    close(run(model, ids, positions="all"), model._module(ids).logits)


@pytest.mark.conformance("load")
def test_a_checkpoint_loads(model, ids, tmp_path):
    model._module.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is MambaModel and loaded.family == model.family
    assert torch.equal(run(loaded, ids), run(model, ids))


@pytest.mark.conformance("sites read")
@sites_where()
def test_every_site_is_read(model, exact, ids, name):
    key = key_of(name)
    expected = forward_by_hand(exact, ids)[key]
    close(cache(model, ids, [key])[key], expected)
    site = TABLES[model.family][name]
    with torch.no_grad(), model.trace(ids):
        value = getattr(owner(model, site, layer_of(name)), site.attribute).save()
    close(value, expected)


@pytest.mark.conformance("sites patched")
@sites_where()
def test_every_site_is_written(model, exact, ids, name):
    positions = [2, 5] if TABLES[model.family][name].by_position else None
    there = forward_by_hand(exact, ids.flip(0))[key_of(name)]
    if name == "h_start":
        there = torch.randn(there.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = there if positions is None else there[:, positions]
    value = value + 0.5 if name == "A" else value
    expected = forward_by_hand(exact, ids, put(name, value, positions))["hook_logits"]
    plainly = forward_by_hand(exact, ids)["hook_logits"]
    assert (expected - plainly).abs().max() > 1e-3
    close(run(model, ids, [Patch(name, layer_of(name), value.float(), positions)], positions="all"), expected)
    if name == "h":
        return
    site = TABLES[model.family][name]
    with torch.no_grad(), model.trace(ids):
        here = getattr(owner(model, site, layer_of(name)), site.attribute)
        if positions is None:
            here[...] = value.float()
        else:
            here[:, positions] = value.float()
        logits = model.logits.save()
    close(logits, expected)


def test_a_written_time_step_reaches_what_is_made_of_it(model, exact, ids):
    first = "delta_2" if model.family == "mamba2" else "delta_1"
    patch = [Patch(first, LAYER, 0.7, [3])]
    expected = forward_by_hand(exact, ids, put(first, torch.tensor(0.7).double(), [3]))
    after = ["delta_2", "delta", "A_bar", "B_bar", "h", "y", "resid_post"]
    found = cache(model, ids, [(name, LAYER) for name in after], patches=patch)
    for name in after:
        close(found[name, LAYER], expected[key_of(name)])
    assert not torch.allclose(expected[key_of("delta_2")], forward_by_hand(exact, ids)[key_of("delta_2")], atol=1e-3)


def test_a_write_takes_the_place_of_what_would_enter(model, exact, ids):
    """Beside edits of what it is made of; and it is kept where those are edited after it."""
    names = ("ssm_input", "B", "delta_2", "A_bar", "B_bar", "write", "h", "y")
    patches = [Patch("write", LAYER, 0.4, [2]), Patch("B_bar", LAYER, 0.3, [4]), Patch("h", LAYER, 0.2, [5])]
    edits = put("write", torch.tensor(0.4).double(), [2]) | put("B_bar", torch.tensor(0.3).double(), [4])
    edits[("h", LAYER)] = lambda h, t: torch.full_like(h, 0.2) if t == 5 else h
    expected = forward_by_hand(exact, ids, edits)
    found = cache(model, ids, [(name, LAYER) for name in names], patches=patches)
    for name in names:
        close(found[name, LAYER], expected[key_of(name)])
    close(run(model, ids, patches, positions="all"), expected["hook_logits"])
    with torch.no_grad(), model.trace(ids):
        mixer = model.layers[LAYER].mixer
        mixer.h.clone()
        mixer.write = 0.4
        mixer.B_bar = 0.3
        write = mixer.write.save()
    assert (write == 0.4).all()


@pytest.mark.conformance("h propagates")
def test_states_that_are_scanned(model, exact, ids):
    shape = (3, 6, 4, 4) if model.family == "mamba2" else (3, 24, 4)
    state = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), model.trace(ids):
        h = model.layers[LAYER].mixer.scan({3: state}).save()
        logits = model.logits.save()
    expected = forward_by_hand(exact, ids, put("h", state.double()[:, None], [3]))
    close(h, expected[key_of("h")])
    close(logits, expected["hook_logits"])


@pytest.mark.conformance("sweep = run")
@sites_where(lambda name, site: site.by_position and site.owner != "model")
def test_a_sweep_gives_what_a_forward_by_hand_does(model, exact, ids, name):
    """At two positions, values of another prompt: those that part from position 2 on, read at different ends."""
    source = ids.clone()
    source[:, 2:] = ids.flip(0)[:, 2:]
    there = forward_by_hand(exact, source)[key_of(name)]
    last = torch.tensor([7, 6, 7])
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(ids[:, :3], last, zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    changes = [[Resample(name, LAYER, position)] for position in (1, 3, 6)]
    found = sweep(model, ids, [[], *changes], readout, source=source)
    expected = [forward_by_hand(exact, ids)["hook_logits"]]
    for position in (1, 3, 6):
        edits = put(name, there[:, [position]], [position])
        expected.append(forward_by_hand(exact, ids, edits)["hook_logits"])
    close(found, torch.stack([one[torch.arange(3), last].gather(1, ids[:, :3]) for one in expected]))


@sites_where(lambda name, site: name != "h")
def test_gradients(model, exact, ids, name):
    """Autograd through the forward by hand gives each site's gradient."""
    leaves = {}

    def keep(value: Tensor) -> Tensor:
        leaves["value"] = value.detach().requires_grad_()
        return leaves["value"]

    logits = forward_by_hand(exact, ids, {(name, layer_of(name)): keep})["hook_logits"]
    logits[:, -1].pow(2).sum().backward()
    site = TABLES[model.family][name]
    with model.trace(ids):
        value = getattr(owner(model, site, layer_of(name)), site.attribute)
        loss = model.logits[:, -1].pow(2).sum()
        with loss.backward():
            grad = value.grad.save()
    expected = leaves["value"].grad
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_states_gradient_is_the_total_derivative(model, exact, ids):
    """Against autograd by hand, where the state at one position is a leaf and the later ones follow from it."""
    found = {}

    def leaf(h: Tensor, t: int) -> Tensor:
        if t != 4:
            return h
        found["h"] = h.detach().requires_grad_()
        return found["h"]

    forward_by_hand(exact, ids, {("h", LAYER): leaf})["hook_logits"][:, -1].pow(2).sum().backward()
    with model.trace(ids):
        h = model.layers[LAYER].mixer.h
        loss = model.logits[:, -1].pow(2).sum()
        with loss.backward():
            grad = h.grad.save()
    expected = found["h"].grad
    torch.testing.assert_close(grad[:, 4].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.conformance("generate")
@pytest.mark.parametrize("use_cache", [True, False])
@sites_where(lambda name, site: name in EDITED)
def test_generation(model, exact, ids, name, use_cache):
    """An edit at each step's last position: with the cache it lasts, without it acts in its own step."""
    prompt, site = ids[:, :4], TABLES[model.family][name]
    with torch.no_grad(), model.generate(prompt, **GREEDY, use_cache=use_cache) as tr:
        seen = list().save()
        for _ in tr.iter[0:4]:
            getattr(owner(model, site, LAYER), site.attribute)[:, -1] += 0.5
            seen.append(model.logits[:, -1].clone())
    grown = prompt
    for step, logits in enumerate(seen):
        at = range(3 if use_cache else 3 + step, 4 + step)

        def add(value: Tensor, t: int | None = None, at=at) -> Tensor:
            if t is not None:
                return value + 0.5 * (t in at)
            value = value.clone()
            value[:, list(at)] += 0.5
            return value

        edits = {(name, LAYER): add}
        alone = 4 if use_cache else None  # from where transformers' own steps have no limits
        expected = forward_by_hand(exact, grown, edits, unlimited=alone)["hook_logits"][:, -1]
        close(logits, expected)
        grown = torch.cat([grown, expected.argmax(-1, keepdim=True)], dim=1)


@pytest.mark.conformance("generate")
@sites_where(lambda name, site: name in ("delta_1", "B", "C", "write", "h", "ssm_input", "resid_post", "after_skip"))
def test_generating_with_patches(model, exact, ids, name):
    prompt = ids[:, :5]
    found = generate(model, prompt, 4, patches=[Patch(name, LAYER, 0.8, [2])], new_patches=[Patch(name, LAYER, -0.6)])
    grown = prompt
    for step in range(4):

        def put_in(value: Tensor, t: int | None = None, step=step) -> Tensor:
            if t is not None:
                return torch.full_like(value, 0.8 if t == 2 else -0.6) if t == 2 or t >= 5 else value
            value = value.clone()
            value[:, 2] = 0.8
            value[:, 5:] = -0.6
            return value

        logits = forward_by_hand(exact, grown, {(name, LAYER): put_in})["hook_logits"][:, -1]
        grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, grown)


@pytest.mark.parametrize(
    "fine",
    [
        pytest.param(False, marks=pytest.mark.conformance("edges")),
        pytest.param(True, marks=pytest.mark.conformance("fine")),
    ],
)
def test_effects_of_edges(model, exact, data, fine):
    last = data.last_position
    corrupt = plain_circuits.mamba_run(exact, data.corrupt_tokens, last)
    clean = plain_circuits.mamba_run(exact, data.clean_tokens, last)
    found = exact_effects(model, data, fine=fine).table.score.tolist()
    for edge, effect in list(zip(Graph(3, fine).edges(), found, strict=True))[:: 3 if fine else 1]:
        resampled = plain_circuits.mamba_run(exact, data.clean_tokens, last, corrupt, {edge})
        change = plain_circuits.nld(resampled, clean, corrupt, data) - plain_circuits.nld(clean, clean, corrupt, data)
        assert effect == pytest.approx(change.mean().item(), abs=2e-3, rel=2e-3)


@pytest.mark.conformance("fine")
def test_effects_of_states(model, exact, data):
    """The edges conv -> ssm and ssm -> out put the other run's states in place, at one position."""
    last = data.last_position
    corrupt = plain_circuits.mamba_run(exact, data.corrupt_tokens, last)
    clean = plain_circuits.mamba_run(exact, data.clean_tokens, last)
    table = exact_effects(model, data, fine=True, ssm="states").table
    for src, dst in ((f"{LAYER}.conv", f"{LAYER}.ssm"), (f"{LAYER}.ssm", str(LAYER)), ("2.conv", "2.ssm")):
        cut = plain_circuits.mamba_run(exact, data.clean_tokens, last, corrupt, {(src, dst)}, False, "states")
        change = plain_circuits.nld(cut, clean, corrupt, data) - plain_circuits.nld(clean, clean, corrupt, data)
        found = table[(table.src == src) & (table.dst == dst)].score.item()
        assert found == pytest.approx(change.mean().item(), abs=2e-3, rel=2e-3) and abs(found) > 1e-4


def scores_by_hooks(module: PreTrainedModel, data: IOIDataset, steps: int) -> dict[tuple[str, str], float]:
    """EAP by torch hooks: gradients at each node's own input, the embedding between the clean and the corrupt one."""
    blocks, base = module.backbone.layers, module.backbone
    names = [*map(str, range(len(blocks))), "output"]
    rows = torch.arange(len(data))

    def forward(embedding: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        adds, inputs, handles = [embedding], [], []
        for norm in (*(block.norm for block in blocks), base.norm_f):

            def own(_, args):
                inputs.append(args[0].clone())
                return (inputs[-1],)

            handles.append(norm.register_forward_pre_hook(own))
        handles += [
            block.mixer.register_forward_hook(lambda _, args, output: adds.append(output.detach())) for block in blocks
        ]
        try:
            logits = module(inputs_embeds=embedding, use_cache=False).logits[rows, data.last_position]
        finally:
            for handle in handles:
                handle.remove()
        return adds, inputs, logits[rows, data.answers] - logits[rows, data.corrupt_answers]

    clean, corrupt = (base.embeddings(ids).detach() for ids in (data.clean_tokens, data.corrupt_tokens))
    here, _, high = forward(clean)
    there, _, low = forward(corrupt)
    scale = 1 / (high - low).abs().detach() / len(data) / steps
    scores = {}
    for step in range(steps):
        alpha = step / (steps - 1)
        _, inputs, metric = forward((clean + alpha * (corrupt - clean)).requires_grad_())
        gradients = torch.autograd.grad((metric * scale).sum(), inputs)
        for j, gradient in enumerate(gradients):
            for i in range(j + 1):
                edge = ("embed", *names)[i], names[j]
                scores[edge] = scores.get(edge, 0.0) + float((gradient * (there[i] - here[i])).sum())
    return scores


@pytest.mark.conformance("EAP")
def test_scores_of_edges(model, exact, data):
    expected = scores_by_hooks(exact, data, 3)
    found = eap(model, data, steps=3).table
    assert len(found) == len(expected)
    largest = max(map(abs, expected.values()))
    for row in found.itertuples():
        assert row.score == pytest.approx(expected[row.src, row.dst], rel=1e-2, abs=1e-3 * largest)


def test_a_family_is_told_by_its_mixers(ids):
    """A model of another kind under the name falcon_mamba has no such mixer, and is any causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    module = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    module.config.model_type = "falcon_mamba"
    assert type(wrap(module, None, model_id="another")) is CausalLM


def test_an_unknown_site_is_named(model):
    with pytest.raises(ValueError, match="unknown site 'hh'"):
        resolve(model, "hh", 0)


# ---------------------------------------------------------------------------------------------------------------------
# On a server without this package
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory) -> Iterator[tuple[MambaModel, MambaModel]]:
    """A model of the family here, and the same on the server."""
    folder = tmp_path_factory.mktemp("served")
    build(request.param).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    worker = Worker(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ndif.Backend, "_exchange", lambda self, *request: worker.exchange(self, *request))
        patch.setitem(_ID_CACHE, str(folder), f"random/{request.param}")
        yield load_model(folder), load_model(folder, remote=True)
    worker.process.kill()


def time_step(model: MambaModel) -> str:
    """The first site of the time step."""
    return "delta_2" if model.family == "mamba2" else "delta_1"


@pytest.mark.slow
@pytest.mark.conformance("remote")
def test_sites_on_a_server(served, ids):
    here, there = served
    assert there.family == here.family and there.layer_kinds == here.layer_kinds
    sites, first = list(TABLES[here.family]), time_step(here)
    everything = cache(here, ids, sites)
    for key, value in cache(there, ids, sites).items():
        close(value, everything[key])
    for name in (first, "B", "C"):
        close(cache(there, ids, [(name, 2)])[name, 2], everything[name, 2])
        patch = [Patch(name, 1, 0.6, [2, 4])]
        close(run(there, ids, patch), run(here, ids, patch))
    close(run(there, ids, [Patch("h", 1, 0.6, [2])]), run(here, ids, [Patch("h", 1, 0.6, [2])]))
    with torch.no_grad(), there.trace(ids):
        mixer = there.layers[1].mixer
        mixer.C[:, 3] = 0.5
        mixer.delta_2[:, 2] = 0.5
        mixer.write[:, 4] = 0.5
        logits = there.logits.save()
    patches = [Patch("C", 1, 0.5, [3]), Patch("delta_2", 1, 0.5, [2]), Patch("write", 1, 0.5, [4])]
    close(logits, run(here, ids, patches, positions="all"))


@pytest.mark.slow
@pytest.mark.conformance("remote")
def test_experiments_on_a_server(served, ids, data):
    here, there = served
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(ids[:, :3], zeros + 7, zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    changes = [[Resample(name, 1, 3)] for name in ("B", time_step(here), "h", "conv")]
    if here.family == "mamba2":
        changes += [[Resample("conv_slice", 1, 3, -1, channels)] for channels in "xBC"]
    close(
        sweep(there, ids, changes, readout, source=ids.flip(0)), sweep(here, ids, changes, readout, source=ids.flip(0))
    )
    patches = {"patches": [Patch("B", 1, 0.8, [2])], "new_patches": [Patch("C", 1, -0.6)]}
    assert torch.equal(generate(there, ids, 3, **patches), generate(here, ids, 3, **patches))
    for work in (eap, exact_effects):
        found, expected = (work(model, data, fine=True).table.score for model in (there, here))
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
