"""The logits are the model's output, on a Mamba whose forward does something after its unembedding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MambaForCausalLM

from mamba_ioi import Patch, cache, circuits, run
from mamba_ioi.experiments import layer_removal, resample_ablation
from mamba_ioi.interventions.attribution import attributed_effects
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset

from . import plain
from .conftest import random_mamba
from .test_any_model import GPT, LAYERS, SIZES, TOKENIZER, V, hf, untouched


class Capped(MambaForCausalLM):
    """A Mamba that caps its logits, as Gemma 2 does, after scaling them, as Granite does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 3)
        return output


@pytest.fixture(scope="module")
def module() -> nn.Module:
    mamba = random_mamba(seed=4, vocab_size=V)
    capped = Capped(mamba.config).eval()
    capped.load_state_dict(mamba.state_dict())
    return capped


@pytest.fixture(scope="module")
def model(module: nn.Module) -> MambaModel:
    return wrap(module, TOKENIZER, model_id="capped")


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 2, seed=5)


def close(found, expected, limit=1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def test_the_cap_does_something(module: nn.Module, data: IOIDataset) -> None:
    with torch.no_grad():
        hidden = module.backbone(data.clean_tokens, use_cache=False)[0]
        logits = module(data.clean_tokens, use_cache=False).logits
    assert (logits - module.lm_head(hidden)).abs().max() > 0.3


def test_run_and_cache(model: MambaModel, module: nn.Module, data: IOIDataset) -> None:
    with torch.no_grad():
        logits = module(data.clean_tokens, use_cache=False).logits
    close(run(model, data.clean_tokens, positions="all"), logits)
    close(run(model, data.clean_tokens), logits[:, -1])
    close(run(model, data.clean_tokens, positions=torch.tensor([3, 1, 4, 1])), logits[range(4), [3, 1, 4, 1]])
    close(cache(model, data.clean_tokens, ["logits"])["logits"], logits)
    patched = run(model, data.clean_tokens, [Patch("logits", None, 7.0, [2])], positions="all")
    expected = logits.clone()
    expected[:, 2] = 7
    close(patched, expected)


def test_the_site_in_a_trace(model: MambaModel, module: nn.Module, data: IOIDataset) -> None:
    ids = data.clean_tokens
    with torch.no_grad():
        logits = module(ids, use_cache=False).logits
    with torch.no_grad(), model.trace(ids) as tracer:
        read = model.logits.clone().save()
        model.logits[:, 1] = 5.0
        model.logits = model.logits + 1
        result = tracer.result.save()
    close(read, logits)
    expected = logits.clone()
    expected[:, 1] = 5
    close(result.logits, expected + 1)


def test_the_site_in_two_invokes(model: MambaModel, module: nn.Module, data: IOIDataset) -> None:
    ids = data.clean_tokens
    with torch.no_grad():
        logits = module(ids, use_cache=False).logits
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            model.logits[:, -1] = 0.5
            first = model.logits.clone().save()
        with tracer.invoke(ids[1:]):
            second = model.logits.clone().save()
    close(first[:, :-1], logits[:1, :-1])
    assert (first[:, -1] == 0.5).all()
    close(second, logits[1:])


def test_a_mamba_of_transformers_is_read_in_its_own_precision(data: IOIDataset) -> None:
    """`MambaForCausalLM` rounds what its unembedding gives to float32."""
    module = random_mamba(seed=4, vocab_size=V, dtype=torch.float64)
    model = wrap(module, TOKENIZER, model_id="random")
    with torch.no_grad():
        expected = module.lm_head(module.backbone(data.clean_tokens, use_cache=False)[0])
        assert module(data.clean_tokens, use_cache=False).logits.dtype == torch.float32
    for found in (
        run(model, data.clean_tokens, positions="all"),
        cache(model, data.clean_tokens, ["logits"])["logits"],
    ):
        assert found.dtype == torch.float64
        close(found, expected, 1e-6)  # transformers' scan is in float32


def test_experiments(model: MambaModel, module: nn.Module, data: IOIDataset) -> None:
    table = layer_removal(model, data, progress=False).table.set_index("layer")
    for layer in range(-1, LAYERS):
        logits = plain.without_layers(module, module.backbone.layers, {layer} - {-1}, data)
        assert table.loc[layer, ["accuracy", "probability"]].tolist() == pytest.approx(
            plain.scores(logits, data), abs=1e-5
        )
    table = resample_ablation(model, data, "in_proj", [1], progress=False).table
    for _, row in table.iterrows():
        rows = data.select(corruption=row["corruption"])
        expected = plain.effects(module, rows, plain.resampled(module, rows, "in_proj", 1, int(row["position"])))
        assert row["effect"] == pytest.approx(float(expected.mean()), abs=1e-3)


def test_circuits(model: MambaModel, module: nn.Module, data: IOIDataset) -> None:
    whole = circuits.evaluate(model, data, circuits.Circuit.of(model, circuits.Graph(LAYERS).edges()))
    logits = plain.last_logits(module, data.clean_tokens, data.last_position)
    assert whole.kl < 1e-6
    assert whole.logit_diff == pytest.approx(sum(plain.differences(logits, data)) / len(data), abs=1e-5)


def test_gradients_start_from_the_output(model: MambaModel, module: nn.Module, data: IOIDataset) -> None:
    """Attribution at `resid_pre` against autograd of the untouched model."""
    readout = Readout.of(data)
    found = attributed_effects(model, data.clean_tokens, readout, "resid_pre", [1], source=data.corrupt_tokens)[0]
    seen: list[torch.Tensor] = []

    def keep(_, args):
        seen.append(args[0].detach().requires_grad_())
        return (seen[-1], *args[1:])

    handle = module.backbone.layers[1].register_forward_pre_hook(keep)
    rows, differences = torch.arange(len(data)), []
    for tokens in (data.clean_tokens, data.corrupt_tokens):
        logits = module(tokens, use_cache=False).logits[rows, data.last_position]
        differences.append(logits[rows, data.answers] - logits[rows, data.corrupt_answers])
    handle.remove()
    gradient = torch.autograd.grad(differences[0].sum(), seen[0])[0]
    change = ((seen[1] - seen[0]) * gradient).sum(-1).detach()
    expected = -change / (differences[0] - differences[1])[:, None].detach()
    close(found.T, expected, 1e-3)


class Remembered(nn.Embedding):
    """Embeddings that keep what they gave last."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(input)
        return self.last


class Beside(nn.Module):
    """An MLP that reads the embeddings as well, past the residual stream."""

    def __init__(self, mlp: nn.Module, embedding: Remembered) -> None:
        super().__init__()
        self.mlp, self.given = mlp, lambda: embedding.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.given())


def test_what_a_stream_does_not_carry_is_refused(data: IOIDataset) -> None:
    """A block that reads the embeddings beside the stream: layers can be removed, edges not resampled."""
    module = untouched(hf.LlamaConfig(**SIZES))
    embedding = Remembered(V, 16, _weight=module.model.embed_tokens.weight)
    module.model.embed_tokens, block = embedding, module.model.layers[1]
    block.mlp = Beside(block.mlp, embedding)
    model = wrap(module, TOKENIZER, model_id="beside")
    table = layer_removal(model, data, progress=False).table.set_index("layer")
    for layer in range(-1, LAYERS):
        logits = plain.without_layers(module, module.model.layers, {layer} - {-1}, data)
        assert table.loc[layer, ["accuracy", "probability"]].tolist() == pytest.approx(
            plain.scores(logits, data), abs=1e-5
        )
    for measure in (circuits.eap, circuits.exact_effects, circuits.acdc):
        with pytest.raises(ValueError, match="circuits cannot be measured: layer 1 of beside reads more of the prompt"):
            measure(model, data, **({"fine": False} if measure is circuits.acdc else {}))


def test_what_happens_between_layers_is_refused(data: IOIDataset) -> None:
    """Rwkv halves its stream every few layers; between the blocks nobody would see it."""
    config = hf.RwkvConfig(vocab_size=V, hidden_size=16, num_hidden_layers=LAYERS, context_length=32, rescale_every=2)
    model = wrap(untouched(config), TOKENIZER, model_id="rwkv")
    with pytest.raises(
        ValueError, match="effects of removed layers cannot be measured: layer 2 of rwkv does not begin"
    ):
        layer_removal(model, data, progress=False)
    with torch.no_grad(), model.trace(data.clean_tokens):
        logits = model.output.logits.save()
    assert logits.shape == (*data.clean_tokens.shape, V)


def test_a_mamba_whose_logits_mix_positions_is_not_loaded() -> None:
    class Mixing(MambaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits - output.logits.mean(1, keepdim=True)
            return output

    with pytest.raises(ValueError, match="logits of mixing do not follow from what its last layer gives at the same"):
        wrap(Mixing(random_mamba().config).eval(), None, model_id="mixing")


def test_a_model_in_training_mode(data: IOIDataset) -> None:
    """Its dropout makes two runs unlike; once that is off, everything is measured."""
    module = untouched(hf.GPT2Config(**GPT)).train()
    model = wrap(module, TOKENIZER, model_id="gpt2")
    for measure in (layer_removal, circuits.exact_effects):
        with pytest.raises(
            ValueError, match=r"cannot be measured: gpt2 is in training mode, .* call model._module.eval"
        ):
            measure(model, data)
    module.eval()
    row = layer_removal(model, data, progress=False).table.iloc[0]
    logits = plain.last_logits(module, data.clean_tokens, data.last_position)
    assert (row["accuracy"], row["probability"]) == pytest.approx(plain.scores(logits, data), abs=1e-5)
    assert len(circuits.exact_effects(model, data).table) == 10


def test_blocks_in_another_order_than_in_their_list(data: IOIDataset) -> None:
    class Reversed(nn.ModuleList):
        def __getitem__(self, index):
            return list(self._modules.values())[::-1][index]

    module = untouched(hf.LlamaConfig(**SIZES))
    module.model.layers.__class__ = Reversed
    with torch.no_grad():
        expected = module(data.clean_tokens, use_cache=False).logits
    model = wrap(module, TOKENIZER, model_id="reversed")
    with torch.no_grad(), model.trace(data.clean_tokens):
        logits = model.output.logits.save()
    close(logits, expected)
    with pytest.raises(ValueError, match="the layers of reversed could not be followed"):
        layer_removal(model, data, progress=False)
