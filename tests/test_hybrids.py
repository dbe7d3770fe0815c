"""Hybrids of scans, attention and MLPs, site by site, against torch hooks and mixers by hand in float64."""

from __future__ import annotations

import pytest
import torch
from nnsight.modeling.huggingface import _ID_CACHE
from torch import Tensor
from transformers import PreTrainedModel

from mamba_ioi import (
    Cut,
    Patch,
    PromptPairs,
    cache,
    generate,
    hidden_attention,
    load_model,
    run,
    token_contributions,
)
from mamba_ioi.circuits import eap, exact_effects
from mamba_ioi.experiments import bottleneck, layer_removal, resample_ablation
from mamba_ioi.interventions.patch import Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import MambaModel
from mamba_ioi.remote import ndif
from mamba_ioi.trace.sites import owner

from .hybrid_models import FAMILIES, IDS, KINDS, MODELS, close, differences, exact, short_pairs
from .plain import NAMES, prompt_tokenizer
from .plain_hybrids import run_by_hand
from .test_remote import Worker

CASES = [
    (family, name, layer)
    for family, model in MODELS.items()
    for layer, names in {tuple(model.sites_of(i)): i for i in reversed(range(model.n_layers))}.items()
    for name in layer
    for layer in [names]
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> MambaModel:
    return MODELS[request.param]


every_site = pytest.mark.parametrize(("model", "name", "layer"), CASES, indirect=["model"])
every_own_site = pytest.mark.parametrize(
    ("model", "name", "layer"), [case for case in CASES if case[1] != "resid_mid"], indirect=["model"]
)
"""But for resid_mid, which `test_the_stream_between_parts` holds."""
with_stream_between = list(dict.fromkeys(case[0] for case in CASES if case[1] == "resid_mid"))
with_circuits = [family for family in FAMILIES if family != "zamba2"]
around_layers = pytest.mark.parametrize("name", ["embed", "norm", "logits"])


def put(name: str, layer: int, value: Tensor, positions: list[int] | None) -> dict:
    if name == "h":
        return {(name, layer): lambda h, t: value[:, positions.index(t)] if t in positions else h}

    def change(there: Tensor) -> Tensor:
        if positions is None:
            return value.expand_as(there)
        there = there.clone()
        there[:, positions] = value
        return there

    return {(name, layer): change}


@pytest.mark.conformance("logits")
def test_what_a_model_says_of_itself(model):
    assert model.layer_kinds == KINDS[model.model_id]
    assert model.family == model._module.config.model_type
    close(run(model, IDS, positions="all"), model._module(IDS, use_cache=False).logits.detach())
    close(run(model, IDS, positions="all"), run_by_hand(exact(model), IDS)[1])
    without = [i for i, kind in enumerate(model.layer_kinds) if "mamba" not in kind]
    for i in without:
        with pytest.raises(ValueError, match="no mixer"):
            _ = model.layers[i].mixer
        with pytest.raises(ValueError, match="no site 'h'"):
            cache(model, IDS, [("h", i)])


def test_nothing_is_lost_under_the_name_of_a_mixer():
    """Of a Nemotron-H the block's part is called so itself; of the others the name is ours."""
    for family in ("nemotron_h", "bamba"):
        block = MODELS[family].layers[0]
        mixer = block.mixer
        with pytest.raises(ValueError, match="mixer"):
            block.mixer = torch.zeros(3)
        assert block.mixer is mixer


@pytest.mark.conformance("sites read")
@every_site
def test_every_site_is_read(model, name, layer):
    if name == "resid_mid":
        expected = run_by_hand(exact(model), IDS)[0]["mlp_in", layer]
    else:
        expected = run_by_hand(exact(model), IDS)[0][name, layer]
    close(cache(model, IDS, [(name, layer)])[name, layer], expected)
    site = model.layer_sites(layer)[name]
    with torch.no_grad(), model.trace(IDS):
        value = getattr(owner(model, site, layer), site.attribute).save()
    close(value, expected)


@pytest.mark.conformance("sites patched")
@every_own_site
def test_every_site_is_written(model, name, layer):
    site = model.layer_sites(layer)[name]
    positions = [2, 5] if site.by_position else None
    there = run_by_hand(exact(model), IDS.flip(0))[0][name, layer]
    if name == "h_start":
        there = torch.randn(there.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = there if positions is None else there[:, positions]
    value = value + 0.5 if name == "A" else value
    expected = run_by_hand(exact(model), IDS, put(name, layer, value, positions))[1]
    assert (expected - run_by_hand(exact(model), IDS)[1]).abs().max() > 1e-4
    close(run(model, IDS, [Patch(name, layer, value.float(), positions)], positions="all"), expected)
    if name == "h":
        return
    with torch.no_grad(), model.trace(IDS):
        here = getattr(owner(model, site, layer), site.attribute)
        if positions is None:
            here[...] = value.float()
        else:
            here[:, positions] = value.float()
        logits = model.logits.save()
    close(logits, expected)


@pytest.mark.conformance("sites patched")
@pytest.mark.parametrize("model", with_stream_between, indirect=True)
def test_the_stream_between_parts(model):
    """A change of resid_mid is in what the MLP reads and in the stream after the block."""
    layers = [i for i in range(model.n_layers) if "resid_mid" in model.sites_of(i)]
    for layer in layers[:2]:
        acts, _ = run_by_hand(exact(model), IDS)
        value = acts["mlp_in", layer].flip(0)
        shift = value - acts["mlp_in", layer]
        edits = put("mlp_in", layer, value, list(range(7))) | {
            ("resid_post", layer): lambda there, shift=shift: there + shift
        }
        expected = run_by_hand(exact(model), IDS, edits)[1]
        close(run(model, IDS, [Patch("resid_mid", layer, value.float())], positions="all"), expected)


def around(model: MambaModel, ids: Tensor, edits: dict) -> tuple[dict[str, Tensor], Tensor]:
    """The values around the layers and the logits, by torch hooks in float64."""
    module, seen = exact(model), {}
    scale = getattr(module.config, "embedding_multiplier", 1.0)

    def hook(name: str, scale: float = 1.0):
        def work(_, args, output):
            seen[name] = edits.get(name, lambda there: there)(output * scale)
            return seen[name] / scale

        return work

    norm = module.model.final_layernorm if hasattr(module.model, "final_layernorm") else None
    norm = norm or getattr(module.model, "norm", None) or module.model.norm_f
    handles = [
        module.get_input_embeddings().register_forward_hook(hook("embed", scale)),
        norm.register_forward_hook(hook("norm")),
    ]
    with torch.no_grad():
        logits = module(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    seen["logits"] = edits.get("logits", lambda there: there)(logits)
    return seen, seen["logits"]


@pytest.mark.conformance("sites read")
@around_layers
def test_sites_around_the_layers_are_read(model, name):
    found = cache(model, IDS, [name, ("resid_pre", 0)])
    close(found[name], around(model, IDS, {})[0][name])
    if name == "embed":
        close(found["embed"], found["resid_pre", 0])  # the stream begins with it, multipliers included
    with torch.no_grad(), model.trace(IDS):
        value = getattr(model, name).save()
    close(value, found[name])


@pytest.mark.conformance("sites patched")
@around_layers
def test_sites_around_the_layers_are_written(model, name):
    value = around(model, IDS.flip(0), {})[0][name][:, [2, 5]]
    expected = around(model, IDS, {name: lambda there: there.index_copy(1, torch.tensor([2, 5]), value)})[1]
    assert (expected - around(model, IDS, {})[1]).abs().max() > 1e-3
    close(run(model, IDS, [Patch(name, None, value.float(), [2, 5])], positions="all"), expected)
    with torch.no_grad(), model.trace(IDS):
        getattr(model, name)[:, [2, 5]] = value.float()
        logits = model.logits.save()
    close(logits, expected)


@pytest.mark.conformance("h propagates")
def test_states_that_are_scanned(model):
    """A state that is held at one position: all later ones, and the logits, follow from it."""
    for layer in scan_layers(model):
        shape = run_by_hand(exact(model), IDS)[0]["h", layer][:, 0].shape
        state = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        acts, expected = run_by_hand(exact(model), IDS, put("h", layer, state.double()[:, None], [3]))
        plainly = run_by_hand(exact(model), IDS)[0]["h", layer]
        assert not torch.allclose(acts["h", layer][:, 4], plainly[:, 4], atol=0.01)
        close(run(model, IDS, [Patch("h", layer, state[:, None], [3])], positions="all"), expected)
        with torch.no_grad(), model.trace(IDS):
            h = model.layers[layer].mixer.scan({3: state}).save()
            logits = model.logits.save()
        close(h, acts["h", layer])
        close(logits, expected)


@every_site
def test_a_value_of_its_own_changes_nothing(model, name, layer):
    own = cache(model, IDS, [(name, layer)])[name, layer]
    close(run(model, IDS, [Patch(name, layer, own)], positions="all"), run(model, IDS, positions="all"))


@pytest.mark.conformance("sweep = run")
def test_a_sweep_gives_what_runs_do(model):
    source = IDS.clone()
    source[:, 2:] = IDS.flip(0)[:, 2:]
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(IDS[:, :3], torch.tensor([6, 5, 6]), zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    cells = [(name, layer) for family, name, layer in CASES if family == model.model_id]
    cells = [(name, layer) for name, layer in cells if model.layer_sites(layer)[name].by_position]
    found = sweep(model, IDS, [[Resample(name, layer, 3)] for name, layer in cells], readout, source=source)
    for (name, layer), logits in zip(cells, found, strict=True):
        there = cache(model, source, [(name, layer)])[name, layer][:, [3]]
        expected = run(model, IDS, [Patch(name, layer, there, [3])], positions=readout.last)
        close(logits, expected.gather(1, readout.tokens))


def scan_layers(model: MambaModel) -> list[int]:
    return [i for i, kind in enumerate(model.layer_kinds) if "mamba" in kind.split("+") or "mamba2" in kind.split("+")]


def cut_by_hand(acts: dict, there: dict | None, layer: int, sources: list[int], target: int) -> Tensor:
    """The y at the target without what the sources write there, or with what they write in the other run."""
    A_bar, write, C = (acts[name, layer] for name in ("A_bar", "write", "C"))
    y = acts["y", layer][:, target].clone()
    for source in sources:
        flow = (0.0 if there is None else there["write", layer][:, source]) - write[:, source]
        for t in range(source + 1, target + 1):
            flow = A_bar[:, t].view(*A_bar[:, t].shape, *[1] * (flow.dim() + 1 - A_bar.dim())) * flow
        read = C[:, target] if flow.dim() == 3 else C[:, target].repeat_interleave(flow.shape[1] // C.shape[2], dim=1)
        y += (flow * (read[:, None] if flow.dim() == 3 else read[:, :, None])).sum(-1).flatten(1)
    return y


@pytest.mark.parametrize("resample", [False, True])
def test_cuts(model, resample):
    """In runs and in sweeps, which run whole prompts here: nothing that is asked for is left out."""
    layer, source = scan_layers(model)[-1], IDS.flip(0)
    acts, there = (run_by_hand(exact(model), ids)[0] for ids in (IDS, source))
    y = acts["y", layer].clone()
    y[:, 5] = cut_by_hand(acts, there if resample else None, layer, [1, 3], 5)
    expected = run_by_hand(exact(model), IDS, {("y", layer): lambda _: y})[1]
    cut = Cut(layer, [1, 3], 5, resample=resample)
    close(run(model, IDS, [cut], positions="all", source=source), expected)
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(IDS[:, :3], zeros + 5, zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    found = sweep(model, IDS, [[], [cut]], readout, source=source)
    assert not torch.allclose(found[0], found[1], atol=1e-5)
    close(found[1], expected[:, 5].gather(1, IDS[:, :3]))
    for other in set(range(model.n_layers)) - set(scan_layers(model)):
        with pytest.raises(ValueError, match=f"layer {other} of {model.model_id} has no scan to cut: it is"):
            run(model, IDS, [Cut([layer, other], 1, 5)])


def test_one_tap_of_a_sweep(model):
    """The other terms stay the run's own."""
    layer, source = scan_layers(model)[0], IDS.flip(0)
    there = run_by_hand(exact(model), source)[0]["conv_slice", layer]

    def put_in(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 3, :, -2] = there[:, 3, :, -2]
        return value

    expected = run_by_hand(exact(model), IDS, {("conv_slice", layer): put_in})[1]
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(IDS[:, :3], zeros + 6, zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    found = sweep(model, IDS, [[Resample("conv_slice", layer, 3, slice=-1)]], readout, source=source)
    close(found[0], expected[:, 6].gather(1, IDS[:, :3]))


def test_channels_of_a_sweep(model):
    """Of x, B and C those that are named change."""
    if "H" not in model.sizes():
        return
    layer, source, inner = scan_layers(model)[0], IDS.flip(0), model.d_inner
    there = run_by_hand(exact(model), source)[0]["conv", layer]

    def put_in(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 3, :inner] = there[:, 3, :inner]
        return value

    expected = run_by_hand(exact(model), IDS, {("conv", layer): put_in})[1]
    zeros = torch.zeros(3, dtype=torch.long)
    readout = Readout(IDS[:, :3], zeros + 6, zeros, zeros + 1, torch.tensor([[0, 1]] * 3))
    found = sweep(model, IDS, [[Resample("conv", layer, 3, channels="x")]], readout, source=source)
    close(found[0], expected[:, 6].gather(1, IDS[:, :3]))


def test_what_tokens_give_to_others_adds_up(model):
    """The mixing matrix makes y of x, and contributions, multipliers included, add up to what the mixer adds."""
    acts = run_by_hand(exact(model), IDS)[0]
    for layer in (i for i in range(model.n_layers) if "write" in model.sites_of(i)):
        x, y, added = (acts[name, layer] for name in ("ssm_input", "y", "out_proj"))
        alpha = hidden_attention(model, IDS, layer, reduce=None).double()
        close(torch.einsum("buts,bsup->btup", alpha, x.unflatten(-1, (alpha.shape[1], -1))).flatten(2), y)
        parts = token_contributions(model, IDS, layer)
        close(parts.sum(2), added)
        close(token_contributions(model, IDS, layer, targets=[4, -1]), parts[:, [4, -1]])


@pytest.mark.conformance("generate")
def test_generation(model):
    """Every new token is the most likely one after all that came before, with the same changes."""
    layer = next(i for i, kind in enumerate(model.layer_kinds) if "mamba" in kind)
    patches, new = [Patch("h", layer, 0.8, [2]), Patch("resid_post", 0, 0.3, [1])], [Patch("write", layer, -0.6)]
    patches.append(Cut(layer, [3, 4], [5, 6], resample=True))
    new.append(Cut(layer, [2, 7], [7, 8], conv=True))
    found = generate(model, IDS, 3, patches=patches, new_patches=new, source=IDS.flip(0))
    grown = IDS
    for _ in range(3):
        length = grown.shape[1]
        later = [Patch("write", layer, -0.6, list(range(7, length)))] if length > 7 else []
        later += [Cut(layer, [2, 7], [7, 8][: length - 7], conv=True)] if length > 7 else []
        logits = run(model, grown, [*patches, *later], source=torch.cat([IDS.flip(0), grown[:, 7:]], 1))
        grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, grown)


@pytest.mark.conformance("load")
def test_a_checkpoint_loads(model, tmp_path):
    model._module.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is MambaModel and loaded.layer_kinds == model.layer_kinds
    assert torch.equal(run(loaded, IDS), run(model, IDS))


# ---------------------------------------------------------------------------------------------------------------------
# Experiments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    return short_pairs()


def test_resample_ablation(model, pairs):
    """Against edits by torch hooks and by hand: 1 - NLD."""
    site = "h" if "mamba" in model.layer_kinds[0] else "resid_pre"
    layer, position = 0, 3
    table = resample_ablation(model, pairs, site, layers=[layer], positions=[position], progress=False).table
    corrupt, _ = run_by_hand(exact(model), pairs.corrupt_tokens)
    edits = put(site, layer, corrupt[site, layer][:, [position]], [position])
    found = [run_by_hand(exact(model), ids)[1] for ids in (pairs.clean_tokens, pairs.corrupt_tokens)]
    high, low = (differences(one, pairs) for one in found)
    patched = differences(run_by_hand(exact(model), pairs.clean_tokens, edits)[1], pairs)
    assert table.effect.item() == pytest.approx((1 - (patched - low) / (high - low)).mean().item(), rel=5e-3, abs=5e-4)


def test_every_layer_that_has_a_site_is_gone_through(model, pairs):
    """Those without it are left out, and refused where they are asked for."""
    for site in ("layer_input", "attn_in", "mlp_out", "resid_pre"):
        there = [layer for layer in range(model.n_layers) if site in model.sites_of(layer)]
        if not there:
            continue
        table = resample_ablation(model, pairs, site, positions=[3], progress=False).table
        assert table.layer.tolist() == there
        for layer in set(range(model.n_layers)) - set(there):
            with pytest.raises(ValueError, match=f"layer {layer} of {model.model_id} has no site '{site}'"):
                resample_ablation(model, pairs, site, layers=[layer], progress=False)


def test_the_bottleneck_is_a_layer_with_a_scan(model, pairs):
    layer = bottleneck(model, pairs)
    effects = {}
    for other in set(scan_layers(model)) - {0}:
        there = run_by_hand(exact(model), pairs.corrupt_tokens)[0]["layer_input", other]
        edits = {("layer_input", other): lambda value, there=there: there}
        found = [run_by_hand(exact(model), ids)[1] for ids in (pairs.clean_tokens, pairs.corrupt_tokens)]
        high, low = (differences(one, pairs) for one in found)
        patched = differences(run_by_hand(exact(model), pairs.clean_tokens, edits)[1], pairs)
        effects[other] = ((high - patched) / (high - low)).median().item()
    assert layer == max(effects, key=lambda one: effects[one])


def test_removed_layers(model, pairs):
    found = layer_removal(model, pairs, progress=False).table
    for layer in range(model.n_layers):
        kept = run_by_hand(exact(model), pairs.clean_tokens)[0]["resid_pre", layer]
        _, logits = run_by_hand(
            exact(model), pairs.clean_tokens, {("resid_post", layer): lambda there, kept=kept: kept}
        )
        rows = torch.arange(len(pairs))
        both = torch.stack([logits[rows, -1, pairs.answers], logits[rows, -1, pairs.corrupt_answers]], 1)
        expected = both.softmax(1)[:, 0].mean().item()
        assert found.probability[layer + 1] == pytest.approx(expected, abs=2e-4)


@pytest.mark.conformance("edges")
@pytest.mark.parametrize("model", with_circuits, indirect=True)
def test_effects_of_edges(model, pairs):
    """Into each block: its own input less what a source adds, more what that adds in the other run."""
    found = exact_effects(model, pairs, progress=False).table.set_index(["src", "dst"]).score
    there, low = run_by_hand(exact(model), pairs.corrupt_tokens)
    here, high = run_by_hand(exact(model), pairs.clean_tokens)
    high, low = differences(high, pairs), differences(low, pairs)
    layer = model.n_layers - 1
    for source in range(layer):
        added = [acts["resid_post", source] - acts["resid_pre", source] for acts in (here, there)]
        kept = {}

        def enter(stream, added=added, kept=kept):
            kept["stream"] = stream
            return stream + added[1] - added[0]

        def leave(stream, added=added):
            return stream - added[1] + added[0]

        edits = {("resid_pre", layer): enter, ("resid_post", layer): leave}
        _, logits = run_by_hand(exact(model), pairs.clean_tokens, edits)
        effect = ((differences(logits, pairs) - high) / (high - low).abs()).mean().item()
        assert found[str(source), str(layer)] == pytest.approx(effect, rel=5e-3, abs=1e-3)


def scores_by_hooks(module: PreTrainedModel, pairs: PromptPairs, steps: int) -> dict[tuple[str, str], float]:
    """EAP by torch hooks: each block has a copy of the stream, and what it adds is its output less that."""
    blocks, embed = module.model.layers, module.get_input_embeddings()
    names = [*map(str, range(len(blocks))), "output"]
    norm = getattr(module.model, "final_layernorm", None) or getattr(module.model, "norm", None) or module.model.norm_f

    def forward(ids: Tensor, embedding: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        adds, inputs, streams, handles = [], [], [], []

        def first(_, args, kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            if not adds:
                value = value if embedding is None else embedding
                adds.append(value)
            streams.append(value)
            inputs.append(value.detach().requires_grad_() if embedding is None else value.clone())
            return ((inputs[-1], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": inputs[-1]})

        def last(_, args, output):
            value = output[0] if isinstance(output, tuple) else output
            adds.append(value - inputs[-1])
            value = streams[-1] + adds[-1]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        for block in blocks:
            handles.append(block.register_forward_pre_hook(first, with_kwargs=True))
            handles.append(block.register_forward_hook(last))
        handles.append(norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()) or (inputs[-1],)))
        logits = module(ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return adds, inputs, differences(logits, pairs)

    with torch.no_grad():
        assert embed is not None
        here, _, high = forward(pairs.clean_tokens, None)
        there, _, low = forward(pairs.corrupt_tokens, None)
    scale = 1 / (high - low).abs() / len(pairs) / steps
    scores: dict[tuple[str, str], float] = {}
    for step in range(steps):
        alpha = step / (steps - 1)
        _, inputs, metric = forward(pairs.clean_tokens, torch.lerp(here[0], there[0], alpha).requires_grad_())
        gradients = torch.autograd.grad((metric * scale).sum(), inputs)
        for j, gradient in enumerate(gradients):
            for i in range(j + 1):
                edge = ("embed", *names)[i], names[j]
                scores[edge] = scores.get(edge, 0.0) + float((gradient * (there[i] - here[i])).sum())
    return scores


@pytest.mark.conformance("EAP")
@pytest.mark.parametrize("model", with_circuits, indirect=True)
def test_scores_of_edges(model, pairs):
    expected = scores_by_hooks(exact(model), pairs, 3)
    table = eap(model, pairs, steps=3, progress=False).table
    largest = max(map(abs, expected.values()))
    assert len(table) == len(expected)
    for row in table.itertuples():
        assert row.score == pytest.approx(expected[row.src, row.dst], rel=2e-2, abs=2e-3 * largest)


@pytest.mark.parametrize(
    ("family", "work"),
    [
        pytest.param("zamba2", exact_effects, marks=pytest.mark.conformance("edges", refused=True)),
        pytest.param("zamba2", eap, marks=pytest.mark.conformance("EAP", refused=True)),
    ],
)
def test_edges_into_blocks_that_read_the_embeddings_are_refused(family, work, pairs):
    with pytest.raises(ValueError, match="read more of the prompt than the residual stream"):
        work(MODELS[family], pairs, progress=False)


@pytest.mark.conformance("fine", refused=True)
def test_edges_inside_layers_of_several_parts_are_refused(model, pairs):
    with pytest.raises(ValueError, match="edges inside a layer"):
        eap(model, pairs, fine=True, progress=False)


@pytest.mark.conformance("remote")
@pytest.mark.parametrize("family", [name for name in FAMILIES if " " not in name])
def test_on_a_server(family, tmp_path, monkeypatch):
    here = MODELS[family]
    here._module.save_pretrained(tmp_path)
    prompt_tokenizer(NAMES).save_pretrained(tmp_path)
    worker = Worker(tmp_path)
    monkeypatch.setattr(ndif.Backend, "_exchange", lambda self, *request: worker.exchange(self, *request))
    monkeypatch.setitem(_ID_CACHE, str(tmp_path), f"random/{family}")
    there = load_model(tmp_path, remote=True)
    assert there.layer_kinds == here.layer_kinds
    for layer in range(here.n_layers):
        sites = [(name, layer) for name in here.sites_of(layer)]
        expected = cache(here, IDS, sites)
        for key, value in cache(there, IDS, sites).items():
            close(value, expected[key])
    for name in ("layer_input", "B", "h", "out_proj"):
        patch = [Patch(name, 0, 0.6, [2, 4])]
        close(run(there, IDS, patch), run(here, IDS, patch))
    for layer in [i for i in range(here.n_layers) if "attn_out" in here.sites_of(i)][:1]:
        for function in (hidden_attention, token_contributions):
            close(*(function(model, IDS, layer, part="attention") for model in (there, here)))
    worker.process.kill()
