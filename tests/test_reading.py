"""The logit lens and direct effects, against hooks on the untouched Hugging Face model, in float64 by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mamba_ioi import IOIDataset, PromptPairs, cache, load_model, planted
from mamba_ioi.experiments import direct_effects, logit_lens
from mamba_ioi.metrics import answer_probability, logit_diff
from mamba_ioi.models.model import wrap
from mamba_ioi.tasks import generate

from . import hybrid_models
from .conftest import random_mamba, random_mamba2
from .test_any_model import CONFIGS, LAYERS, TOKENIZER, V, untouched

SCANS = {
    "mamba": lambda: random_mamba(vocab_size=V, num_hidden_layers=LAYERS),
    "mamba2": lambda: random_mamba2(vocab_size=V, num_hidden_layers=LAYERS),
}
NAMES = [*SCANS, *(name for name in CONFIGS if name not in ("opt", "rwkv"))]


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    name = request.param
    module = SCANS[name]() if name in SCANS else untouched(CONFIGS[name]())
    return wrap(module, TOKENIZER, model_id=name), copy.deepcopy(module)


@pytest.fixture(scope="module")
def pairs() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 4, seed=3, templates="aligned")


def list_of_blocks(module: nn.Module) -> nn.ModuleList:
    count = module.config.num_hidden_layers
    return next(part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == count)


def first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def streams(module: nn.Module, ids: Tensor) -> list[Tensor]:
    """The residual stream before the first block and after each."""
    blocks, found = list_of_blocks(module), []
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0].clone())),
        *(block.register_forward_hook(lambda _, args, output: found.append(first(output).clone())) for block in blocks),
    ]
    module(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def ended(module: nn.Module, ids: Tensor, stream: Tensor) -> dict[str, Tensor]:
    """A run whose last block gives that stream: what the norm and the head are given and give, and the logits."""
    found = {}
    head = module.get_output_embeddings()

    def put(_, args, output):
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    def keep(_, args, output):
        found.update(normed=args[0].clone(), head=output.clone())

    handles = [list_of_blocks(module)[-1].register_forward_hook(put), head.register_forward_hook(keep)]
    found["logits"] = module(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


def test_the_lens_is_the_models_own_end(case, pairs):
    model, module = case
    table = logit_lens(model, pairs).table
    ids, rows = pairs.clean_tokens, torch.arange(len(pairs))
    assert sorted(table["layer"].unique()) == list(range(-1, LAYERS))
    for layer, stream in enumerate(streams(module, ids), start=-1):
        logits = ended(module, ids, stream)["logits"]
        mine = table[table["layer"] == layer].set_index("position")
        for position in (1, 4, ids.shape[1] - 1):
            at = logits[:, position]
            answer = at[rows, pairs.answers]
            expected = {
                "logit_diff": (answer - at[rows, pairs.corrupt_answers]).mean(),
                "probability": answer_probability(at, pairs.answers, pairs.candidates).mean(),
            }
            for name, value in expected.items():
                assert mine.loc[position, name] == pytest.approx(float(value), rel=1e-3, abs=2e-4), (name, layer)
            above = (at > answer[:, None] + 1e-4).sum(1).double(), (at > answer[:, None] - 1e-4).sum(1).double()
            assert float(above[0].mean()) <= mine.loc[position, "rank"] - 1 <= float(above[1].mean()), layer


def toward(module: nn.Module, pairs: IOIDataset) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """In float64: streams, the readout's direction ``[B, D]`` by the weights, what it adds, the logit difference."""
    exact = copy.deepcopy(module).double()
    exact.config._experts_implementation = "eager"  # which alone knows float64
    ids, rows = pairs.clean_tokens, torch.arange(len(pairs))
    found = streams(exact, ids)
    ends = ended(exact, ids, found[-1])
    x, y = found[-1][:, -1], ends["normed"][:, -1]
    head, norm = exact.get_output_embeddings(), final_norm(exact)
    b = getattr(norm, "bias", None)
    b = torch.zeros(x.shape[1], dtype=x.dtype) if b is None else b.detach()
    centred = type(norm).__name__.endswith("LayerNorm")
    gain = (y - b) / (x - x.mean(1, keepdim=True) if centred else x)
    weight = (head.weight[pairs.answers] - head.weight[pairs.corrupt_answers]).detach()
    bias = 0.0 if getattr(head, "bias", None) is None else head.bias[pairs.answers] - head.bias[pairs.corrupt_answers]
    before, after = (
        logits[rows, -1, pairs.answers] - logits[rows, -1, pairs.corrupt_answers]
        for logits in (ends["head"], ends["logits"].double())
    )
    logits, given = ends["logits"][:, -1].double(), ends["head"][:, -1]
    ratio = (logits * given).sum() / given.pow(2).sum()
    times = ratio if torch.allclose(logits, ratio * given, rtol=1e-9) else 1.0  # else a soft cap
    direction = times * weight * gain
    direction = direction - direction.mean(1, keepdim=True) if centred else direction
    constant = times * ((weight * b).sum(1) + bias)
    torch.testing.assert_close(times * before, (direction * x).sum(1) + constant)
    if isinstance(times, Tensor):
        torch.testing.assert_close(times * before, after)
    return found, direction, constant, times * before


def final_norm(module: nn.Module) -> nn.Module:
    """The last module before the head that is called a norm."""
    return [part for name, part in module.named_modules() if "norm" in name.rpartition(".")[2] or "ln_" in name][-1]


def test_what_layers_write_adds_up(case, pairs):
    """Each layer's effect is that of its change of the stream; their sum is the logit difference, before a soft cap."""
    model, module = case
    result = direct_effects(model, pairs)
    if model.model_id == "opt_post_norm":  # which ends with a projection
        difference = logit_diff(logits(model, pairs), pairs.answers, pairs.corrupt_answers).mean()
        assert result.table["effect"].sum() == pytest.approx(float(difference), rel=1e-4)
        return
    found, direction, constant, difference = toward(module, pairs)
    before, *after = [(stream[:, -1] * direction).sum(1) for stream in found]
    scale = float(sum((one.abs().mean() for one in after), before.abs().mean()))
    table = result.table.groupby(["layer", "part"])["effect"].sum()
    assert table[-1, "embed"] == pytest.approx(float(before.mean()), abs=1e-4 * scale)
    assert table[-1, "bias"] == pytest.approx(float(torch.as_tensor(constant).mean()), abs=1e-4 * scale)
    previous = before
    for layer, value in enumerate(after):
        assert table[layer].sum() == pytest.approx(float((value - previous).mean()), abs=1e-4 * scale), layer
        previous = value
    assert result.table["effect"].sum() == pytest.approx(float(difference.mean()), abs=1e-4 * scale)
    assert result.meta["logit_diff"] == pytest.approx(float(difference.mean()), abs=1e-4 * scale)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "granitemoehybrid dense", "falcon_h1", "jamba"])
def test_tokens_and_channels_share_a_mixers_effect(family):
    """By hand from what out_proj is given, its weight and the multiplier; tokens' sums are the mixer's own effect."""
    model = wrap(SCANS[family](), TOKENIZER, model_id=family) if family in SCANS else hybrid_models.MODELS[family]
    data = IOIDataset.generate(TOKENIZER, 3, seed=4, templates="aligned")
    if family not in SCANS:
        ids = torch.randint(0, hybrid_models.V, (2, 3, 8), generator=torch.Generator().manual_seed(5))
        answers = torch.tensor([3, 4, 5])
        data = PromptPairs(clean_tokens=ids[0], corrupt_tokens=ids[1], answers=answers, corrupt_answers=answers + 9)
    layer = next(i for i in range(model.n_layers) if "write" in model.sites_of(i))
    whole = direct_effects(model, data).table.set_index(["layer", "part"])["effect"]
    channels = direct_effects(model, data, "channel", layers=[layer])
    mine = channels.table[(channels.table["layer"] == layer) & (channels.table["part"] == "mixer")]
    assert mine["effect"].sum() == pytest.approx(whole[layer, "mixer"], rel=1e-3, abs=1e-5)
    assert channels.table["effect"].sum() == pytest.approx(channels.meta["logit_diff"], rel=1e-3, abs=1e-4)
    given = cache(model, data.clean_tokens, [("after_skip", layer), ("out_proj", layer)], positions=-1)
    weight = model.layers[layer].mixer.out_proj._module.weight.detach()
    scale = float(given["out_proj", layer].norm() / (given["after_skip", layer] @ weight.T).norm())
    _, direction, _, _ = toward(copy.deepcopy(model._module), data)
    by_hand = (given["after_skip", layer][:, 0] * (scale * direction.float() @ weight)).mean(0)
    torch.testing.assert_close(
        torch.tensor(mine["effect"].to_numpy()[: len(by_hand)]).float(), by_hand, rtol=1e-3, atol=1e-5
    )
    if all("attn_out" not in model.sites_of(i) for i in range(model.n_layers)):
        tokens = direct_effects(model, data, "token")
        shares = tokens.table.groupby(["layer", "part"])["effect"].sum()
        for key, effect in whole.items():
            assert shares[key] == pytest.approx(effect, rel=1e-3, abs=1e-5), key


def test_planted_names_are_read_where_they_were_written():
    """The bottleneck alone writes the answer, from where the names are written into its state."""
    model = planted(n_layers=4, layer=2)
    data = generate("ioi", model.tokenizer, 8, templates="aligned")
    layers = direct_effects(model, data).table.set_index(["layer", "part"])["effect"]
    assert layers.idxmax() == (2, "mixer") and layers.max() > 0.9 * layers.sum()
    lens = logit_lens(model, data, marks=["last"]).table.set_index("layer")
    assert lens["logit_diff"][1] < 0.1 * lens["logit_diff"][2] and lens["rank"][2] == 1
    assert lens["logit_diff"][3] == pytest.approx(
        float(logit_diff(logits(model, data), data.answers, data.corrupt_answers).mean()), rel=1e-4
    )


def logits(model, data: IOIDataset) -> Tensor:
    with torch.no_grad():
        return model._module(data.clean_tokens).logits[torch.arange(len(data)), data.last_position]


def test_marks_of_rows_that_differ():
    model = load_model("tiny")
    data = generate("ioi", model.tokenizer, 6, templates="all")
    table = logit_lens(model, data, layers=[0, 5]).table
    assert list(table["mark"].unique()) == ["n1", "n2", "n3", "n4", "n5", "last"]
    own = logit_lens(model, data[:1], layers=[5]).table
    assert set(table["layer"]) == {-1, 0, 5} and set(own["layer"]) == {-1, 5}
    last = table[(table["mark"] == "last") & (table["layer"] == 5)]
    by_hand = logit_diff(logits(model, data), data.answers, data.corrupt_answers).mean()
    assert float(last["logit_diff"].iloc[0]) == pytest.approx(float(by_hand), rel=1e-4)
    total = direct_effects(model, data, "token", layers=[1])
    assert total.table["effect"].sum() == pytest.approx(float(by_hand), rel=1e-4)


def test_refused():
    model = load_model("tiny")
    data = generate("ioi", model.tokenizer, 2, templates="aligned")
    with pytest.raises(ValueError, match="by is one of layer, token, channel, not 'head'"):
        direct_effects(model, data, "head")
    with pytest.raises(ValueError, match="layers=3 are those told apart"):
        direct_effects(model, data, layers=3)
    with pytest.raises(ValueError, match="layers are whole numbers from 0 to 5"):
        logit_lens(model, data, layers=[6])
    with pytest.raises(ValueError, match="no mark 'n9'"):
        logit_lens(model, data, marks=["n9"])
    falcon = wrap(untouched(CONFIGS["falcon"]()), TOKENIZER, model_id="falcon")
    with pytest.raises(ValueError, match="layer 0 of falcon does not call transformers' attention function"):
        direct_effects(falcon, IOIDataset.generate(TOKENIZER, 2), "token")
