"""Result: what a round trip keeps, what a failed save leaves, what loading refuses; bootstrap intervals."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mamba_ioi.result import FORMAT_VERSION, Result, bootstrap_interval

MODEL = SimpleNamespace(model_id="tiny", revision="abc123", dtype="torch.float32", device="cpu", n_layers=8)


def table(value: float = 0.1) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": [-1, 0, 1],
            "label": ["<|endoftext|>", " Lauren->Wesley", "ünï\n$x$"],
            "effect": [value, 1 / 3, np.nan],
            "n": np.array([3, 3, 3], dtype=np.int32),
            "kept": [True, False, True],
        }
    )


def result(value: float = 0.1) -> Result:
    return Result.create("layer_removal", table(value), model=MODEL, arguments={"site": "h", "layers": (1, 2)}, seed=27)


class TestCreate:
    def test_meta_says_how_it_was_made(self):
        meta = result().meta
        assert meta["experiment"] == "layer_removal"
        assert (meta["model"], meta["revision"], meta["n_layers"], meta["seed"]) == ("tiny", "abc123", 8, 27)
        assert (meta["dtype"], meta["device"]) == ("torch.float32", "cpu")
        assert meta["arguments"] == {"site": "h", "layers": [1, 2]}
        assert set(meta["versions"]) == {"python", "mamba_ioi", "torch", "transformers", "nnsight"}
        assert meta["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert datetime.fromisoformat(meta["date"]).utcoffset().total_seconds() == 0

    def test_a_model_without_the_attributes_leaves_them_empty(self):
        meta = Result.create("x", table(), model=None, arguments={}).meta
        assert meta["model"] is None and meta["revision"] is None and meta["seed"] is None

    def test_name_or_path_stands_in_for_model_id(self):
        assert (
            Result.create("x", table(), model=SimpleNamespace(name_or_path="gpt2"), arguments={}).meta["model"]
            == "gpt2"
        )

    def test_extra_entries_join_but_do_not_overwrite(self):
        assert Result.create("x", table(), model=None, arguments={}, target=0.9).meta["target"] == 0.9
        with pytest.raises(ValueError, match="meta\\['date'\\] is filled in"):
            Result.create("x", table(), model=None, arguments={}, date="today")

    @pytest.mark.parametrize("value", [object(), {1, 2}, np.int64(3), float("nan"), {"deep": [np.ones(2)]}])
    def test_meta_that_json_cannot_hold_is_refused(self, value):
        with pytest.raises(ValueError, match="meta\\['note'\\] must be storable as JSON"):
            Result(table(), {"experiment": "x", "note": value})

    def test_meta_needs_an_experiment(self):
        with pytest.raises(ValueError, match="must name its experiment"):
            Result(table(), {})

    def test_the_table_must_be_a_table(self):
        with pytest.raises(ValueError, match="pandas DataFrame, not list"):
            Result([1], {"experiment": "x"})
        with pytest.raises(ValueError, match="unique text column names"):
            Result(pd.DataFrame([[1, 2]], columns=["a", "a"]), {"experiment": "x"})
        with pytest.raises(ValueError, match="unique text column names"):
            Result(pd.DataFrame([[1, 2]]), {"experiment": "x"})

    def test_meta_is_a_copy(self):
        arguments = {"layers": [1]}
        made = Result.create("x", table(), model=None, arguments=arguments)
        arguments["layers"].append(2)
        assert made.meta["arguments"] == {"layers": [1]}


class TestRoundTrip:
    def test_table_and_meta_return_as_they_were(self, tmp_path):
        before = result()
        folder = before.save(tmp_path / "deep" / "fig4")
        after = Result.load(folder)
        pd.testing.assert_frame_equal(after.table, before.table, check_exact=True)
        assert after.meta == before.meta
        assert sorted(os.listdir(folder)) == ["meta.json", "table.parquet"]

    def test_a_filtered_table_returns_with_a_fresh_index(self, tmp_path):
        part = Result(table()[1:], {"experiment": "x"})
        pd.testing.assert_frame_equal(Result.load(part.save(tmp_path)).table, part.table)
        assert list(part.table.index) == [0, 1]

    def test_an_empty_table_keeps_its_columns(self, tmp_path):
        empty = Result(table()[:0], {"experiment": "x"})
        pd.testing.assert_frame_equal(Result.load(empty.save(tmp_path)).table, empty.table)

    def test_meta_is_plain_json_for_other_tools(self, tmp_path):
        stored = json.loads((result().save(tmp_path) / "meta.json").read_text(encoding="utf-8"))
        assert stored["experiment"] == "layer_removal" and stored["format_version"] == FORMAT_VERSION

    def test_saving_again_replaces(self, tmp_path):
        result(0.1).save(tmp_path)
        result(0.2).save(tmp_path)
        assert Result.load(tmp_path).table["effect"][0] == 0.2


class TestInterruptedSaves:
    def test_a_table_that_parquet_refuses_leaves_the_old_result(self, tmp_path):
        result(0.1).save(tmp_path)
        with pytest.raises(ValueError, match="cannot be stored as parquet"):
            Result(pd.DataFrame({"mixed": [1, "a", object()]}), {"experiment": "x"}).save(tmp_path)
        assert Result.load(tmp_path).table["effect"][0] == 0.1
        assert sorted(os.listdir(tmp_path)) == ["meta.json", "table.parquet"]

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_disk_that_fails_leaves_the_old_result_and_no_scraps(self, tmp_path, monkeypatch, call):
        result(0.1).save(tmp_path)

        def fail(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="no space"):
            result(0.2).save(tmp_path)
        monkeypatch.undo()
        assert Result.load(tmp_path).table["effect"][0] == 0.1
        assert sorted(os.listdir(tmp_path)) == ["meta.json", "table.parquet"]

    def test_meta_takes_its_name_last_and_both_files_are_whole_by_then(self, tmp_path, monkeypatch):
        names, real = [], os.replace

        def watch(source, target):
            names.append((os.path.basename(target), set(os.listdir(tmp_path)) & {"meta.json", "table.parquet"}))
            assert os.path.getsize(source) > 0 and os.path.dirname(source) == os.path.dirname(target)
            real(source, target)

        monkeypatch.setattr(os, "replace", watch)
        result().save(tmp_path)
        assert names == [("table.parquet", set()), ("meta.json", {"table.parquet"})]

    def test_a_save_stopped_between_the_two_renames_is_seen(self, tmp_path, monkeypatch):
        result(0.1).save(tmp_path)
        real = os.replace

        def stop_at_meta(source, target):
            if os.path.basename(target) == "meta.json":
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", stop_at_meta)
        with pytest.raises(KeyboardInterrupt):
            result(0.2).save(tmp_path)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"is not the table that meta\.json describes"):
            Result.load(tmp_path)


class TestLoadRefuses:
    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is not a folder with a saved result"):
            Result.load(tmp_path / "absent")

    @pytest.mark.parametrize("name", ["meta.json", "table.parquet"])
    def test_a_missing_file(self, tmp_path, name):
        (result().save(tmp_path) / name).unlink()
        with pytest.raises(ValueError, match=f"no complete result: {name} is missing$"):
            Result.load(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
    @pytest.mark.parametrize("name", ["meta.json", "table.parquet"])
    def test_a_truncated_file(self, tmp_path, name, keep):
        file = result().save(tmp_path) / name
        content = file.read_bytes().rstrip()
        file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match=f"{name} is not readable as (JSON|parquet)"):
            Result.load(tmp_path)

    @pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None])
    def test_another_format_version(self, tmp_path, version):
        file = result().save(tmp_path) / "meta.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}))
        with pytest.raises(ValueError, match="is of format version"):
            Result.load(tmp_path)

    @pytest.mark.parametrize("content", ["{}", "[]", "3", '{"experiment": "x"}'])
    def test_json_that_no_save_wrote(self, tmp_path, content):
        (result().save(tmp_path) / "meta.json").write_text(content)
        with pytest.raises(ValueError, match=r"not written by Result\.save"):
            Result.load(tmp_path)

    def test_the_table_of_another_result(self, tmp_path):
        result(0.1).save(tmp_path / "a")
        result(0.2).save(tmp_path / "b")
        os.replace(tmp_path / "a" / "table.parquet", tmp_path / "b" / "table.parquet")
        with pytest.raises(ValueError, match=r"is not the table that meta\.json describes"):
            Result.load(tmp_path / "b")

    def test_a_pickle_which_it_never_opens(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "opened"),)

        trap = pickle.dumps(Trap())
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "table.pkl").write_bytes(trap)
        with pytest.raises(ValueError, match=r"table\.pkl is a pickle, and pickles are never loaded"):
            Result.load(tmp_path / "only")
        (result().save(tmp_path / "disguised") / "table.parquet").write_bytes(trap)
        with pytest.raises(ValueError, match=r"table\.parquet is not readable as parquet"):
            Result.load(tmp_path / "disguised")
        (result().save(tmp_path / "beside") / "table.pkl").write_bytes(trap)
        Result.load(tmp_path / "beside")
        assert not (tmp_path / "opened").exists()


def test_an_experiment_without_a_figure_is_named():
    with pytest.raises(ValueError, match="no figure is known for the experiment 'alchemy'"):
        Result(table(), {"experiment": "alchemy"}).plot()


def test_a_result_can_be_read_without_torch_or_matplotlib():
    code = """
import sys
from mamba_ioi.result import Result
print([m for m in ("torch", "matplotlib", "seaborn") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestBootstrapInterval:
    def test_one_value_is_its_own_interval(self):
        low, high = bootstrap_interval([[0.3], [0.7]])
        assert low.tolist() == high.tolist() == [0.3, 0.7]

    def test_equal_values_give_no_width(self):
        low, high = bootstrap_interval(np.full((2, 37), 0.1))
        assert (low == 0.1).all() and (high == 0.1).all()

    def test_equals_a_plain_loop_over_resamples(self):
        values = np.random.default_rng(5).normal(size=23)
        counts = np.random.default_rng(0).multinomial(23, np.full(23, 1 / 23), size=1000)
        means = [np.mean(np.repeat(values, row)) for row in counts]
        low, high = bootstrap_interval(values)
        np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975]), rtol=1e-12)

    def test_leading_axes_equal_their_entries_alone(self):
        values = np.random.default_rng(1).normal(size=(2, 3, 11))
        low, high = bootstrap_interval(values, n_resamples=200)
        assert low.shape == high.shape == (2, 3)
        for index in np.ndindex(2, 3):
            np.testing.assert_allclose(
                (low[index], high[index]), bootstrap_interval(values[index], n_resamples=200), rtol=1e-12
            )

    def test_covers_the_true_mean_about_as_often_as_it_says(self):
        samples = np.random.default_rng(2).normal(size=(2000, 40))
        low, high = bootstrap_interval(samples, level=0.9)
        assert 0.86 < ((low <= 0) & (high >= 0)).mean() < 0.92

    def test_is_as_wide_as_theory_for_a_share(self):
        hits = np.repeat([1.0, 0.0], [300, 100])
        low, high = bootstrap_interval(hits, n_resamples=4000)
        assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.75 * 0.25 / 400), rel=0.08)

    def test_the_seed_decides(self):
        values = np.random.default_rng(3).normal(size=9)
        assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
        assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            ([], {}, "at least one value"),
            (0.5, {}, "at least one value"),
            ([1.0, np.nan], {}, "finite values"),
            ([1.0, np.inf], {}, "finite values"),
            ([1.0], {"level": 1}, "level must lie between 0 and 1"),
            ([1.0], {"n_resamples": 0}, "n_resamples must be at least 1"),
        ],
    )
    def test_refuses(self, values, options, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(values, **options)
