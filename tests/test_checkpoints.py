"""Checkpoints: after loading, every tensor in the files is the model's, or one sentence names the one that is not.

The oracle is the transformers model that the files were written from, and the tensors in the files themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaForCausalLM

from mamba_ioi import load_model, run
from mamba_ioi.models.model import wrap

from .conftest import random_mamba

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
FORMS = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
DEEP = "backbone.layers.1.mixer.A_log"


def write(folder: Path, weights: dict[str, Tensor], form: str) -> None:
    """Write weights as one file or as three shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()}
    if not form.endswith(".index.json"):
        put(folder / form, weights)
        return
    stem, suffix = form.removesuffix(".index.json").rsplit(".", 1)
    keys, index = sorted(weights), {}
    for number in range(3):
        name = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        put(folder / name, {key: weights[key] for key in keys[number::3]})
        index |= dict.fromkeys(keys[number::3], name)
    (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")


def put(path: Path, weights: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"format": "pt"})
    else:
        torch.save(weights, path)


def original(folder: Path, module: MambaForCausalLM, form: str = FORMS[1], edit=None, **config) -> dict[str, Tensor]:
    """A folder in the layout of the state-spaces repositories; `edit` changes its tensors first."""
    weights = {key.replace("embeddings.", "embedding."): tensor for key, tensor in module.state_dict().items()}
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    if edit is not None:
        edit(weights)
    write(folder, weights, form)
    settings = {"d_model": 12, "n_layer": 3, "vocab_size": 61, "ssm_cfg": {}, "rms_norm": True}
    settings |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return weights


def transformed(folder: Path, module, form: str = FORMS[0], edit=None, **config) -> dict[str, Tensor]:
    """A folder in transformers' layout."""
    weights = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    if getattr(module.config, "tie_word_embeddings", False):
        del weights[HEAD]
    if edit is not None:
        edit(weights)
    write(folder, weights, form)
    settings = json.loads(module.config.to_json_string(use_diff=False)) | {"architectures": [type(module).__name__]}
    (folder / "config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return weights


LAYOUTS = pytest.mark.parametrize("layout", [original, transformed])


def holds(model, weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> bool:
    """Whether the model's tensors are these."""
    held = model._module.state_dict()
    pairs = [(held[key.replace("embedding.", "embeddings.")], tensor) for key, tensor in weights.items()]
    return all(torch.equal(mine, theirs.to(dtype or mine.dtype)) and mine.dtype == dtype for mine, theirs in pairs)


def logits(module) -> Tensor:
    with torch.no_grad():
        return module(IDS, use_cache=False).logits


def refused(folder: Path, words: str, **options) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_model(folder, **options)
    said = str(error.value)
    assert "\n" not in said and not said.rstrip().endswith(":")


def other_head(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = torch.randn(61, 12, generator=torch.Generator().manual_seed(7))


class TestWhatLoads:
    @LAYOUTS
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("tied", [True, False])
    def test_layouts_and_files(self, tmp_path, layout, form, tied):
        module = random_mamba(seed=3, tie_word_embeddings=tied)
        said = {"tie_embeddings": tied} if layout is original else {}
        weights = layout(tmp_path, module, form, **said)
        model = load_model(tmp_path)
        assert holds(model, weights, torch.float32) and torch.equal(logits(model._module), logits(module))
        assert (model._module.lm_head.weight is model._module.backbone.embeddings.weight) == tied
        torch.testing.assert_close(run(model, IDS, positions="all"), logits(module), rtol=0, atol=1e-5)

    @LAYOUTS
    @pytest.mark.parametrize("form", FORMS)
    def test_a_head_of_its_own_whatever_the_config_says(self, tmp_path, layout, form, caplog):
        """Untied in the files: without a word in the config, and against it, with a warning."""
        module = random_mamba(seed=3, tie_word_embeddings=False)
        expected, quiet = logits(module), layout is original
        for i, config in enumerate(({}, {"tie_embeddings": True, "tie_word_embeddings": True})):
            caplog.clear()
            weights = layout(tmp_path / str(i), module, form, **config)
            model = load_model(tmp_path / str(i))
            assert holds(model, weights, torch.float32) and torch.equal(logits(model._module), expected)
            assert not model._module.config.tie_word_embeddings
            assert ("ties the head" in caplog.text) == bool(config)
            tied = {**weights, HEAD: weights.get(EMBEDDING, weights.get("backbone.embeddings.weight"))}
            assert not torch.allclose(torch.func.functional_call(module, {HEAD: tied[HEAD]}, (IDS,)).logits, expected)
        assert quiet or model._module.config.model_type == "mamba"

    def test_without_a_head_the_original_layout_is_tied(self, tmp_path):
        module = random_mamba(seed=3)
        original(tmp_path, module, edit=lambda weights: weights.pop(HEAD))
        assert torch.equal(logits(load_model(tmp_path)._module), logits(module))

    @pytest.mark.parametrize("sizes", [{"expand": 3}, {"conv_kernel": 3}, {"state_size": 5}, {"time_step_rank": 2}])
    @pytest.mark.parametrize("said", [True, False])
    def test_sizes(self, tmp_path, sizes, said):
        """In ssm_cfg, or in the shapes of the weights alone."""
        module = random_mamba(seed=3, **sizes)
        names = {"expand": "expand", "conv_kernel": "d_conv", "state_size": "d_state", "time_step_rank": "dt_rank"}
        ssm = {names[name]: value for name, value in sizes.items()} if said else {}
        weights = original(tmp_path, module, ssm_cfg=ssm)
        model = load_model(tmp_path)
        assert holds(model, weights, torch.float32) and torch.equal(logits(model._module), logits(module))

    @pytest.mark.parametrize("use_bias", [True, False])
    @pytest.mark.parametrize("use_conv_bias", [True, False])
    @pytest.mark.parametrize("said", [True, False])
    def test_biases(self, tmp_path, use_bias, use_conv_bias, said):
        module = random_mamba(seed=3, use_bias=use_bias, use_conv_bias=use_conv_bias)
        ssm = {"bias": use_bias, "conv_bias": use_conv_bias, "layer": "Mamba1", "dt_rank": "auto"} if said else {}
        weights = original(tmp_path, module, ssm_cfg=ssm)
        model = load_model(tmp_path)
        assert holds(model, weights, torch.float32) and torch.equal(logits(model._module), logits(module))

    @pytest.mark.parametrize("in_fp32", [True, False])
    @pytest.mark.parametrize("fused", [True, False])
    def test_the_residual_s_precision(self, tmp_path, in_fp32, fused):
        """Which one decides in low precision: bfloat16's logits are those of transformers with the same setting."""
        module = random_mamba(seed=3, residual_in_fp32=in_fp32).bfloat16()
        original(tmp_path, module, residual_in_fp32=in_fp32, fused_add_norm=fused)
        model = load_model(tmp_path)
        assert model.dtype == torch.bfloat16 and torch.equal(logits(model._module), logits(module))
        other = random_mamba(seed=3, residual_in_fp32=not in_fp32).bfloat16()
        assert not torch.equal(logits(other), logits(module))

    @pytest.mark.parametrize(
        "config",
        [
            {"vocab_size": 58},
            {"vocab_size": 61, "pad_vocab_size_multiple": 1},
            {"vocab_size": 50, "pad_vocab_size_multiple": 61},
        ],
    )
    def test_padded_vocabularies(self, tmp_path, config):
        weights = original(tmp_path, random_mamba(seed=3), **config)
        assert holds(load_model(tmp_path), weights, torch.float32)

    def test_a_pickle_of_the_oldest_format(self, tmp_path):
        module = random_mamba(seed=3)
        weights = original(tmp_path, module)
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert holds(load_model(tmp_path), weights, torch.float32)


class TestPrecision:
    @LAYOUTS
    def test_weights_are_rounded_once_at_most(self, tmp_path, layout):
        """A config that says bfloat16 rounds nothing on the way of float32 weights to float32, or to float64."""
        module = random_mamba(seed=3)
        weights = layout(tmp_path, module, dtype="bfloat16", torch_dtype="bfloat16")
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            assert holds(load_model(tmp_path, dtype=dtype), weights, dtype)
        assert holds(load_model(tmp_path), weights, torch.float32)

    @LAYOUTS
    @pytest.mark.parametrize(
        ("one", "others", "expected"),
        [
            (torch.float32, torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.float16, torch.float32),
            (torch.float64, torch.float32, torch.float64),
            (torch.bfloat16, torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16, torch.float16),
        ],
    )
    @pytest.mark.parametrize("key", ["backbone.layers.2.mixer.D", "backbone.layers.0.mixer.A_log"])
    def test_files_of_several_precisions(self, tmp_path, layout, one, others, expected, key):
        def edit(weights):
            for name in weights:
                weights[name] = weights[name].to(one if name == key else others)

        weights = layout(tmp_path, random_mamba(seed=3), edit=edit, **({} if layout is original else {"dtype": None}))
        assert holds(load_model(tmp_path), weights, expected)

    @LAYOUTS
    def test_what_a_precision_cannot_hold(self, tmp_path, layout):
        def edit(weights):
            weights["backbone.layers.1.norm.weight"][3] = -123456.0

        weights = layout(tmp_path, random_mamba(seed=3), edit=edit)
        words = r"float16 cannot hold -123456, a value of backbone\.layers\.1\.norm\.weight; .*float32 .*bfloat16"
        refused(tmp_path, words, dtype="float16")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert holds(load_model(tmp_path, dtype=dtype), weights, dtype)

    def test_activations_that_a_precision_cannot_hold(self, tmp_path):
        """The weights fit into float16, and what is computed from them does not."""

        def edit(weights):
            weights[HEAD] = weights[HEAD] * 20000

        original(tmp_path, random_mamba(seed=3, tie_word_embeddings=False), edit=edit)
        refused(tmp_path, "logits that are not finite in float16, which holds nothing beyond 65504", dtype="float16")
        assert load_model(tmp_path).dtype == torch.float32

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @LAYOUTS
    def test_weights_that_are_not_finite(self, tmp_path, layout, value):
        layout(tmp_path, random_mamba(seed=3), edit=lambda weights: weights[DEEP][2].fill_(value))
        refused(tmp_path, rf"{DEEP} holds NaN or infinite values")
        refused(tmp_path, rf"{DEEP} holds NaN or infinite values", dtype="float16")

    def test_a_wrapped_module_that_is_not_finite(self):
        module = random_mamba()
        module.get_parameter(DEEP).data[0] = float("nan")
        with pytest.raises(ValueError, match=f"{DEEP} holds NaN"):
            wrap(module, None, model_id="broken")

    @LAYOUTS
    def test_whole_numbers_are_no_weights(self, tmp_path, layout):
        layout(
            tmp_path, random_mamba(seed=3), edit=lambda weights: weights.update({DEEP: weights[DEEP].to(torch.int8)})
        )
        refused(tmp_path, f"{DEEP} .* is of int8")


class TestWhatIsRefused:
    @LAYOUTS
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            (lambda weights: weights.pop(DEEP), f"its weights lack {DEEP}"),
            (lambda weights: weights.update({"backbone.layers.3.mixer.D": torch.ones(24)}), "hold backbone.layers.3"),
            (
                lambda weights: weights.update({"extra.weight": torch.ones(2)}),
                "hold extra.weight, which its config has",
            ),
            (lambda weights: weights.update({DEEP: weights[DEEP][:, :3].clone()}), rf"{DEEP} has the shape \(24, 3\)"),
            (lambda weights: weights.update({DEEP: weights[DEEP].T.clone()}), rf"{DEEP} has the shape \(4, 24\)"),
        ],
    )
    def test_tensors(self, tmp_path, layout, form, edit, words):
        layout(tmp_path, random_mamba(seed=3), form, edit)
        refused(tmp_path, words)

    @LAYOUTS
    @pytest.mark.parametrize("key", ["norm.weight", "mixer.conv1d.bias", "mixer.A_log", "mixer.in_proj.weight"])
    def test_layer_0(self, tmp_path, layout, key):
        """Which the original layout's sizes are not read from alone."""
        name = f"backbone.layers.0.{key}"
        layout(tmp_path, random_mamba(seed=3), edit=lambda weights: weights.pop(name))
        refused(tmp_path, f"its weights lack {name}")
        layout(tmp_path, random_mamba(seed=3), edit=lambda weights: weights.update({name: weights[name][:-1].clone()}))
        refused(tmp_path, rf"{name} has the shape")

    @LAYOUTS
    def test_an_untied_model_without_its_head(self, tmp_path, layout):
        config = {"tie_embeddings": False, "tie_word_embeddings": False}
        layout(tmp_path, random_mamba(seed=3), edit=lambda weights: weights.pop(HEAD, None), **config)
        refused(tmp_path, f"its weights lack {HEAD}")

    @LAYOUTS
    def test_a_head_of_another_size(self, tmp_path, layout):
        module = random_mamba(seed=3, tie_word_embeddings=False)
        layout(tmp_path, module, edit=lambda weights: weights.update({HEAD: weights[HEAD][:-1].clone()}))
        refused(tmp_path, rf"{HEAD} has the shape \(60, 12\)")

    @LAYOUTS
    def test_an_embedding_of_another_size(self, tmp_path, layout):
        def cut(weights):
            for key in [key for key in weights if "embedding" in key or key == HEAD]:
                weights[key] = weights[key][:40].clone()

        layout(tmp_path, random_mamba(seed=3), edit=cut)
        refused(tmp_path, r"has the shape \(40, 12\), and its config asks for \(6[14], 12\)")

    @pytest.mark.untyped
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"ssm_cfg": {"layer": "Mamba2"}}, "asks for Mamba2 layers; only Mamba1"),
            ({"attn_layer_idx": [1]}, "asks for attention layers; only Mamba1"),
            ({"ssm_cfg": {"layer": "Mamba1"}, "attn_layer_idx": [1]}, "asks for attention layers"),
            ({"d_intermediate": 24}, "asks for MLPs"),
            ({"rms_norm": False}, "asks for LayerNorm"),
            ({"ssm_cfg": {"d_state": 8}}, r"A_log has the shape \(24, 4\), and its config asks for \(24, 8\)"),
            ({"ssm_cfg": {"expand": 3}}, "has the shape .* and its config asks for"),
            ({"ssm_cfg": {"expand": 1.5}}, "1.5 times as wide"),
            ({"ssm_cfg": {"d_conv": 3}}, r"conv1d.weight has the shape \(24, 1, 4\), .* \(24, 1, 3\)"),
            ({"ssm_cfg": {"dt_rank": 5}}, "has the shape .* and its config asks for"),
            ({"ssm_cfg": {"conv_bias": False}}, "hold backbone.layers.0.mixer.conv1d.bias and 2 more"),
            ({"ssm_cfg": {"bias": True}}, "lack backbone.layers.0.mixer.in_proj.bias and 5 more"),
            ({"n_layer": 2}, "hold backbone.layers.2.mixer.A_log and 9 more"),
            ({"n_layer": 4}, "lack backbone.layers.3.mixer.A_log and 9 more"),
            ({"n_layer": "three"}, "n_layer must be a whole number"),
            ({"d_model": 16}, "could not be loaded"),
            ({"vocab_size": 30}, r"has the shape \(61, 12\), and its config asks for \(32, 12\)"),
        ],
    )
    def test_original_configs_that_do_not_fit(self, tmp_path, config, words):
        original(tmp_path, random_mamba(seed=3), **config)
        refused(tmp_path, words)

    @LAYOUTS
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("size", [0, 5, 1000, -50])
    def test_truncated_files(self, tmp_path, layout, form, size):
        layout(tmp_path, random_mamba(seed=3), form)
        path = sorted(path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin"))[-1]
        path.write_bytes(path.read_bytes()[:size])
        refused(tmp_path, f"{path.name} cannot be read: .")

    @LAYOUTS
    @pytest.mark.parametrize("form", FORMS[2:])
    def test_indexes(self, tmp_path, layout, form):
        layout(tmp_path, random_mamba(seed=3), form)
        shard = sorted(tmp_path.glob("*-of-*"))[1]
        held = shard.read_bytes()
        shard.unlink()
        refused(tmp_path, f"{form} names {shard.name}, which is not there")
        shard.write_bytes(held)
        load_model(tmp_path)
        for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}'):
            (tmp_path / form).write_text(text, encoding="utf-8")
            refused(tmp_path, f"{form} has no weight_map")

    @LAYOUTS
    def test_a_tensor_that_two_shards_hold(self, tmp_path, layout):
        layout(tmp_path, random_mamba(seed=3), FORMS[2])
        shard = sorted(tmp_path.glob("*-of-*"))[-1]
        weights = load_file(shard)
        other = load_file(sorted(tmp_path.glob("*-of-*"))[0])
        for key in other:
            put(shard, {**weights, key: other[key]})
            load_model(tmp_path)
            put(shard, {**weights, key: other[key] + 1})
            refused(
                tmp_path,
                f"{key} in its weights is not {key.replace('embedding.', 'embeddings.')} in the model|{EMBEDDING}",
            )

    @pytest.mark.parametrize("held", [[1, 2], {"a": 3}, torch.ones(2), {"model": {"a": torch.ones(2)}}])
    @LAYOUTS
    def test_pickles_of_something_else(self, tmp_path, layout, held):
        layout(tmp_path, random_mamba(seed=3), FORMS[1])
        torch.save(held, tmp_path / "pytorch_model.bin")
        refused(tmp_path, "pytorch_model.bin holds a")


class TestOtherLanguageModels:
    @pytest.fixture(params=["gpt2", "llama"])
    def module(self, request):
        torch.manual_seed(0)
        if request.param == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
            return GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes)).eval()
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()

    @pytest.mark.parametrize("form", FORMS)
    def test_loading(self, tmp_path, module, form):
        weights = transformed(tmp_path, module, form)
        model = load_model(tmp_path)
        assert holds(model, weights, torch.float32) and torch.equal(logits(model._module), logits(module))

    def test_a_base_model_s_names(self, tmp_path, module):
        """As gpt2's own repository has them, with tables that are computed today."""
        prefix = f"{module.base_model_prefix}."
        weights = {key.removeprefix(prefix): tensor for key, tensor in module.state_dict().items()}
        transformed(tmp_path, module)
        write(
            tmp_path,
            {**weights, "h.0.attn.bias": torch.ones(1, 1, 9, 9), "h.0.attn.masked_bias": torch.ones(1)},
            FORMS[0],
        )
        assert torch.equal(logits(load_model(tmp_path)._module), logits(module))

    def test_a_head_of_its_own(self, tmp_path, module):
        head = torch.randn(module.lm_head.weight.shape, generator=torch.Generator().manual_seed(7))
        weights = transformed(tmp_path, module, edit=lambda weights: weights.update({HEAD: head}))
        model = load_model(tmp_path)
        assert holds(model, weights, torch.float32)
        module.lm_head.weight = torch.nn.Parameter(head)
        assert torch.equal(logits(model._module), logits(module))
        with torch.no_grad(), model.trace(IDS):
            out = model.lm_head.output.save()
        assert torch.equal(out, logits(module))

    def test_what_is_refused(self, tmp_path, module):
        key = [key for key in module.state_dict() if ".1." in key and key.endswith("weight")][-1]
        for name, edit, words in (
            ("lack", lambda weights: weights.pop(key), f"lack {key}"),
            ("hold", lambda weights: weights.update({"v_head.weight": torch.ones(3)}), "hold v_head.weight"),
            ("shape", lambda weights: weights.update({key: torch.ones(3)}), rf"{key} has the shape \(3,\)"),
            ("nan", lambda weights: weights[key].fill_(float("nan")), f"{key} holds NaN"),
        ):
            transformed(tmp_path / name, module, edit=edit)
            refused(tmp_path / name, words)
        transformed(tmp_path / "cast", module, edit=lambda weights: weights[key].fill_(1e5))
        refused(tmp_path / "cast", f"float16 cannot hold 100000, a value of {key}", dtype="float16")


def test_texts_are_utf8_whatever_the_locale(tmp_path):
    """config.json, an index and a circuit's file, under a locale of ASCII alone."""
    module = random_mamba(seed=3)
    for i, (layout, form) in enumerate([(original, FORMS[3]), (transformed, FORMS[2])]):
        folder = tmp_path / str(i)
        layout(folder, module, form, note="ä 中")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        index = json.loads((folder / form).read_text(encoding="utf-8"))
        index["metadata"]["by"] = "Łukasz"
        (folder / form).write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    code = f"""
import locale, torch
from mamba_ioi import load_model
from mamba_ioi.circuits import Circuit
assert locale.getpreferredencoding(False) != "UTF-8"
assert all(load_model(folder).n_layers == 3 for folder in {[str(tmp_path / "0"), str(tmp_path / "1")]})
path = Circuit((("embed", "output"),), 2, meta={{"note": "\\u00e4 \\u4e2d"}}).save({str(tmp_path / "circuit.json")!r})
assert Circuit.load(path).meta == {{"note": "\\u00e4 \\u4e2d"}}
"""
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ascii_alone, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ä 中" in (tmp_path / "circuit.json").read_text(encoding="utf-8")


def test_a_tokenizer_that_cannot_be_read_is_not_another_s(tmp_path, caplog):
    transformed(tmp_path, random_mamba(seed=3))
    assert load_model(tmp_path).tokenizer is None and not caplog.text
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    assert load_model(tmp_path).tokenizer is None
    assert f"the tokenizer of {tmp_path} cannot be read" in caplog.text
