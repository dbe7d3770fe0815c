"""The command line: figures that survive interruptions, and bad input refused in one line."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MambaForCausalLM

import mamba_ioi
from mamba_ioi import __version__
from mamba_ioi import reproduce as pipeline
from mamba_ioi.catalogue import CATALOGUE
from mamba_ioi.cli import main
from mamba_ioi.experiments import EXPERIMENTS
from mamba_ioi.models.model import load_model
from mamba_ioi.remote import requests
from mamba_ioi.result import Result
from mamba_ioi.trace.sites import SITES
from mamba_ioi.zoo.tokenizer import build_tokenizer

ROOT = Path(mamba_ioi.__file__).parents[1]
FEW = ["--pairs", "2"]
AVAILABLE = {figure: row for figure, row in CATALOGUE.items() if row.lacks is None and not row.needs_dictionary}
"""The figures that can be made here of a model without a dictionary: one needs scikit-learn."""
PLANTED = ["reproduce", "--model", "planted", *FEW]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local directory with a planted Mamba of two layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "local"
    model = mamba_ioi.planted(n_layers=2, layer=1, n_names=8)
    model._module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local directory with a random GPT-2 of two layers, under the planted model's tokenizer."""
    other = tmp_path_factory.mktemp("models") / "gpt2"
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(other)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, other)
    return other


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every figure."""
    out = tmp_path_factory.mktemp("made") / "figures"
    assert main(["reproduce", "--model", str(folder), *FEW, "--out", str(out)]) == 0
    return out


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time of change and content."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What is said on stderr by a command that must be refused: one line."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mamba-ioi: error: ") and said.endswith("\n") and said.count("\n") == 1, said
    return said


# --- the table of figures ---------------------------------------------------------------------------------------------


def test_the_table_agrees_with_the_experiments() -> None:
    by_experiment = {row.experiment: (figure, row) for figure, row in CATALOGUE.items()}
    assert set(EXPERIMENTS) <= set(by_experiment)
    for name, experiment in EXPERIMENTS.items():
        figure, row = by_experiment[name]
        assert figure == experiment.figure
        assert (row.takes_layer, row.needs_mamba) == (experiment.takes_layer, experiment.needs_mamba)
        assert row.pairs == (None if experiment.input == "prompts" else experiment.pairs)
        kinds = {"balanced": "of each template and corruption"}
        assert row.per_pair == (kinds.get(experiment.input, "") if row.multiple == 1 else f"times {row.multiple}")
        assert experiment.multiple == {"fig9": 125, "fig9_pca": 125, "probe": 5}.get(figure, 1)


def test_every_figure_is_made(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted(
        [
            "results",
            *pipeline.REPORTS,
            "appd3.html",
            *(
                f"{name}{suffix}"
                for name in (*AVAILABLE, "appd3_layer1", "appd3_tables")
                for suffix in (".png", ".pdf")
            ),
        ]
    )
    for figure, row in AVAILABLE.items():
        assert (made / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (made / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        folder = made / "results" / figure
        assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "table.parquet"]
        result = Result.load(folder)
        assert tuple(result.table.columns) == row.columns and len(result.table)
        asked = result.meta["request"]
        assert (asked["figure"], asked["model"], asked["mamba_ioi"]) == (figure, "local", mamba_ioi.__version__)
        assert len(asked["weights"]) == 64
        if row.takes_layer:
            assert asked["layer"] is None and result.meta["arguments"]["layer"] == 1


def test_a_figure_that_lacks_a_package_is_left_out_and_the_others_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    reason = "it needs scikit-learn: pip install 'mamba-ioi[probe]'"
    few = {figure: CATALOGUE[figure] for figure in ("fig3", "fig5", "fig5_greedy", "probe")}
    for module in ("catalogue", "reproduce.run", "reproduce.plan", "reproduce.makers"):
        monkeypatch.setattr(f"mamba_ioi.{module}.CATALOGUE", few)
    monkeypatch.setattr("mamba_ioi.catalogue.choose.__defaults__", (few,))
    asked = ["reproduce", "--model", folder, *FEW, "--out", tmp_path]
    assert main([*map(str, asked)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^probe +left out: {re.escape(reason)}$", said, re.M) and "fig5_greedy  computed" in said
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"bottleneck", "fig3", "fig5", "fig5_greedy"}
    assert "Probes (probe)" in (tmp_path / "report.md").read_text().replace("\\", "")
    assert f"probe cannot be made: {reason}" in refusal(capsys, *asked, "--only", "probe")


def test_a_figure_is_what_its_experiment_gives(made: Path, folder: Path) -> None:
    model = mamba_ioi.load_model(str(folder))
    for name in ("resample_ablation_h", "conv_slices"):
        expected = EXPERIMENTS[name](model, pairs=2, progress=False).table
        stored = Result.load(made / "results" / EXPERIMENTS[name].figure).table
        pd.testing.assert_frame_equal(stored, expected, check_exact=True)


# --- runs that survive ------------------------------------------------------------------------------------------------


def test_what_is_complete_is_kept(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_ioi.models.model, "load_model", None)  # nothing is computed, so no model is needed
    before = snapshot(made)
    again = ["reproduce", "--model", str(folder), *FEW, "--out", str(made)]
    assert main(again) == 0
    assert snapshot(made) == before
    (made / "fig4.pdf").unlink()
    assert main(again) == 0
    after = snapshot(made)
    assert after["fig4.pdf"][1] == before["fig4.pdf"][1]
    drawn = ("fig4.png", "fig4.pdf")
    assert all(after[name] == before[name] for name in before if name not in drawn)


def test_a_killed_run_goes_on_and_ends_alike(made: Path, folder: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    argv = ["reproduce", "--model", str(folder), *FEW, "--only", "fig5,fig7,fig8", "--out", str(killed)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mamba_ioi", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "results" / "fig5" / "meta.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = snapshot(killed / "results")
    assert "fig5/meta.json" in left and "fig8/meta.json" not in left
    assert main(argv) == 0
    after = snapshot(killed / "results")
    assert all(after[name] == left[name] for name in left if not Path(name).name.startswith("."))
    figures = ("fig5", "fig5_greedy", "fig7", "fig8")
    for figure in figures:
        tables = [Result.load(out / "results" / figure).table for out in (made, killed)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    pictures = [f"{figure}{suffix}" for figure in figures for suffix in (".png", ".pdf")]
    assert {path.name for path in killed.iterdir()} == {"results", *pictures, *pipeline.REPORTS}, "nothing temporary"
    assert all((killed / name).read_bytes() == (made / name).read_bytes() for name in pictures)


@pytest.mark.parametrize(
    "figure", ["fig5_greedy", *(pytest.param(figure, marks=pytest.mark.slow) for figure in ("fig6", "appd2"))]
)
def test_a_figure_goes_on_from_the_rounds_that_it_has_done(
    figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removal, cross-talk and ACDC take as many rounds as the model needs; killed in one, they keep those before."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["reproduce", "--model", "planted", "--pairs", "2", "--only", figure, "--out"]
    asked: list[str] = []
    keep, find = requests.Answers.keep, requests.Answers.find

    def found(self: requests.Answers, key: str) -> dict | None:
        answer = find(self, key)
        asked.append("found" if answer is not None else "computed")
        return answer

    monkeypatch.setattr(requests, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(requests.Answers, "find", found)
    assert main([*argv, str(whole)]) == 0
    rounds = len(asked)
    assert rounds > 6 and set(asked) == {"computed"}
    assert not (whole / "results" / figure / "answers").exists()

    def interrupt(self: requests.Answers, key: str, answer: dict) -> None:
        keep(self, key, answer)
        if len(asked) == rounds // 2:
            raise KeyboardInterrupt

    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(requests.Answers, "keep", interrupt)
        assert main([*argv, str(killed)]) == 130
    asked.clear()
    kept = len(list((killed / "results" / figure / "answers").iterdir()))  # without those that chose the bottleneck
    assert kept > 0
    assert main([*argv, str(killed)]) == 0
    assert asked == ["found"] * kept + ["computed"] * (rounds - rounds // 2)
    tables = [Result.load(out / "results" / figure).table for out in (whole, killed)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert not (killed / "results" / figure / "answers").exists()


def test_answers_of_another_work_or_model_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "WORTH_KEEPING", 0.0)
    model, calls = load_model("planted"), []

    def work(model, number: int, aside: int) -> dict[str, torch.Tensor]:
        calls.append(number)
        return {"twice": torch.tensor([2 * number])}

    def ask(asked: dict, number: int, aside: int = 0, dtype: torch.dtype = torch.float32) -> int:
        with requests.answers_in(model, tmp_path, asked):
            return int(requests.ask(model.to(dtype), work, number, aside=(aside,))["twice"])

    assert [ask({"weights": "a"}, 1), ask({"weights": "a"}, 1, aside=7)] == [2, 2] and calls == [1]
    assert [ask({"weights": "a"}, 2), ask({"weights": "b"}, 1), ask({"weights": "a"}, 1, 0, torch.float64)] == [4, 2, 2]
    assert calls == [1, 2, 1, 1]
    assert int(requests.ask(model, work, 1, aside=(0,))["twice"]) == 2 and len(calls) == 5, "nothing is kept outside"


def test_a_save_cut_short_is_taken_up(tmp_path: Path) -> None:
    argv = [*PLANTED, "--only", "fig3,fig5", "--out", str(tmp_path)]
    assert main(argv) == 0
    expected = snapshot(tmp_path)
    (tmp_path / "results/fig5/meta.json").unlink()
    (tmp_path / "results/fig5" / f".meta.json.{'0' * 32}").write_text('{"format_ver')
    (tmp_path / f".fig3.{'a' * 32}").write_bytes(b"\x89PNG")
    (tmp_path / f".report.html.{'b' * 32}").write_text("<!DOC")
    (tmp_path / "fig5.png").write_bytes(b"of an older result")
    assert main(argv) == 0
    after = snapshot(tmp_path)
    assert sorted(after) == sorted(expected)
    for name, (_, content) in expected.items():
        if name not in ("results/fig5/meta.json", *pipeline.REPORTS):  # which hold the date
            assert after[name][1] == content, name


def test_one_failed_figure_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model, data):
        raise RuntimeError("no such luck,\nsorry")

    argv = [*PLANTED, "--only", "fig3,fig5,fig12", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setitem(CATALOGUE, "fig5", replace(CATALOGUE["fig5"], function=fail))
        assert main(argv) == 1
        assert capsys.readouterr().err == "mamba-ioi: fig5 failed: RuntimeError: no such luck, sorry\n"
        assert main([*argv, "--verbose"]) == 1
        assert "Traceback" in capsys.readouterr().err
        assert (tmp_path / "fig12.pdf").exists() and (tmp_path / "fig5_greedy.png").exists()
        assert not (tmp_path / "fig5.png").exists()
    assert main(argv) == 0
    assert (tmp_path / "fig5.png").exists()


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*PLANTED, "--only", "fig3", "--out", str(tmp_path)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # the result fits, its picture does not
    try:
        said = refusal(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said
    assert sorted(snapshot(tmp_path)) == ["results/fig3/meta.json", "results/fig3/table.parquet"]
    assert main(argv) == 0
    assert (tmp_path / "fig3.pdf").exists()


@pytest.mark.slow
def test_a_report_that_could_not_be_written_is_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed just before its file takes its name, or without room for it."""
    argv = [*PLANTED, "--only", "fig3", "--out", str(tmp_path)]
    assert main(argv) == 0
    before = snapshot(tmp_path)
    results = {name: state for name, state in before.items() if name not in pipeline.REPORTS}
    size = (tmp_path / "report.html").stat().st_size
    for name in pipeline.REPORTS:
        (tmp_path / name).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        assert "File too large" in refusal(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == results
    code = """if True:
        import os, signal, sys
        from mamba_ioi.cli import main
        replace = os.replace
        def killing(old, new):
            if new.name == "report.html":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)
        os.replace = killing
        main(sys.argv[1:])"""
    assert subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT).returncode == -signal.SIGKILL
    left = snapshot(tmp_path)
    assert any(name.startswith(".report.html.") for name in left)
    assert main(argv) == 0
    after = snapshot(tmp_path)
    assert sorted(after) == sorted(before)
    assert {name: state for name, state in after.items() if name not in pipeline.REPORTS} == results


# --- folders that are refused -----------------------------------------------------------------------------------------


def test_a_result_made_otherwise_is_refused_and_left_alone(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(made)
    base = ["reproduce", "--model", folder, "--out", made]
    assert "pairs=2, and pairs=3 is asked for; choose another --out" in refusal(capsys, *base, "--pairs", 3)
    assert "seed=27, and seed=28" in refusal(capsys, *base, *FEW, "--seed", 28)
    assert "layer=None, and layer=1" in refusal(capsys, *base, *FEW, "--layer", 1, "--only", "fig8")
    assert "dtype=None, and dtype=float64" in refusal(capsys, *base, *FEW, "--dtype", "float64")
    assert "model=local, and model=planted" in refusal(capsys, *PLANTED, "--out", made, "--only", "fig3")
    monkeypatch.setattr(mamba_ioi, "__version__", "9.9")
    assert f"mamba_ioi={__version__}, and mamba_ioi=9.9" in refusal(capsys, *base, *FEW)
    assert snapshot(made) == before


def test_one_folder_holds_one_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the figures are different ones, and where a local model's weights have changed in their place."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    out = tmp_path / "out"
    assert main(["reproduce", "--model", str(copy), *FEW, "--out", str(out), "--only", "fig3"]) == 0
    assert "model=copy, and model=planted" in refusal(capsys, *PLANTED, "--out", out, "--only", "fig2")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert "weights=" in refusal(capsys, "reproduce", "--model", copy, *FEW, "--out", out, "--only", "fig3")


@pytest.mark.parametrize("damage", ["meta", "table", "origin"])
def test_a_damaged_result_is_refused_and_left_alone(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*PLANTED, "--only", "fig3", "--out", tmp_path]
    assert main(list(map(str, argv))) == 0
    result = tmp_path / "results" / "fig3"
    if damage == "origin":
        mine = Result.load(result)
        Result(mine.table, {"experiment": "residual_graph"}).save(result)
    else:
        file = result / {"meta": "meta.json", "table": "table.parquet"}[damage]
        file.write_bytes(file.read_bytes()[:50])
    before = snapshot(tmp_path)
    assert str(result) in refusal(capsys, *argv)
    assert snapshot(tmp_path) == before


def test_two_runs_into_one_folder_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "in use by another run" in refusal(capsys, *PLANTED, "--only", "fig3", "--out", tmp_path)
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    assert main([*PLANTED, "--only", "fig3", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / ".lock").exists()


def test_something_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    argv = [*PLANTED, "--only", "fig3", "--out"]
    assert "is a file where a folder should be" in refusal(capsys, *argv, tmp_path / "file")
    assert "Not a directory" in refusal(capsys, *argv, tmp_path / "file" / "below")
    assert "No such file" in refusal(capsys, *argv, "/proc/nowhere")
    assert "File name too long" in refusal(capsys, *argv, tmp_path / ("x" * 300))
    out = tmp_path / "out"
    (out / "results").mkdir(parents=True)
    (out / "results" / "fig3").write_text("mine")
    assert "is a file where a folder should be" in refusal(capsys, *argv, out)
    (out / "results" / "fig3").unlink()
    (out / "fig3.png").mkdir()
    assert "is a folder where a picture is to be written" in refusal(capsys, *argv, out)
    assert (tmp_path / "file").read_text() == "mine"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "a command is needed"),
        ("banana", "invalid choice: 'banana'"),
        ("reproduce --only fig99", "no figure 'fig99'; there are fig2"),
        ("reproduce --only fig4,,fig5", "no figure ''"),
        ("reproduce --pairs 0", "at least 1, not '0'"),
        ("reproduce --pairs=-3", "at least 1, not '-3'"),
        ("reproduce --pairs 1.5", "at least 1, not '1.5'"),
        ("reproduce --seed=-1", "at least 0, not '-1'"),
        ("reproduce --layer x", "at least 0, not 'x'"),
        ("reproduce --dtype int8", "invalid choice: 'int8'"),
        ("reproduce --colour red", "unrecognized arguments"),
        ("reproduce --model planted --layer 6 --only fig8", "from 0 to 5, at least one of them, not 6"),
        ("reproduce --model planted --layer 1 --only fig4", "none looks at one layer"),
        ("reproduce --model planted --device abacus --only fig3", "device 'abacus' cannot be used here"),
        ("reproduce --model ./absent", "there is no directory './absent'"),
        ("run", "arguments are required: EXPERIMENT"),
        ("run fortune_telling", "no experiment 'fortune_telling'; there are"),
        ("run cross_talk --layer 1", "--layer has no meaning"),
        ("run resample_ablation --channels B", "resample_ablation tells no channels apart; --channels has no meaning"),
        ("run conv_slices --channels D", "argument --channels: invalid choice: 'D'"),
        ("run conv_slices --channels B", "channels='B' at the site 'conv_slice' of tiny: those of x, B and C are told"),
        ("reproduce --channels B", "unrecognized arguments: --channels B"),
        ("run conv_slices --model planted --layer 17", "from 0 to 5"),
        ("run cross_talk --model ./absent", "there is no directory './absent'"),
        ("doctor --model ./absent", "there is no directory './absent'"),
        ("plot absent", "absent is not a folder"),
        ("train-tiny --seed 1", "arguments are required: --out"),
        ("train-tiny --out new --steps 0", "at least 1, not '0'"),
        ("train-tiny --out new --family gpt2", "invalid choice: 'gpt2'"),
        ("train --out new --task banana", "invalid choice: 'banana'"),
        ("train --out new --task recall --family gpt2", "the families are mamba, mamba-noconv, mamba2, attention"),
    ],
)
def test_bad_arguments(
    argv: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *argv.split())
    assert snapshot(tmp_path) == {}


def test_models_that_cannot_be_used(folder: Path, gpt2: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "need a Mamba" in refusal(capsys, "run", "conv_slices", "--model", gpt2, *FEW)
    assert "need a Mamba" in refusal(capsys, "reproduce", "--only", "fig4", "--model", gpt2, *FEW)

    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:10_000])
    assert "could not be loaded" in refusal(capsys, "run", "conv_slices", "--model", cut, *FEW)

    sick = tmp_path / "sick"
    shutil.copytree(folder, sick)
    module = MambaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        module.backbone.layers[1].mixer.D[3] = float("nan")
    module.save_pretrained(sick)
    assert "not finite" in refusal(capsys, "run", "conv_slices", "--model", sick, *FEW)

    nameless = tmp_path / "nameless"
    shutil.copytree(folder, nameless)
    build_tokenizer(["Mary", "John"]).save_pretrained(nameless)
    assert "names as single tokens" in refusal(capsys, "reproduce", "--model", nameless, *FEW)
    for file in nameless.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(capsys, "reproduce", "--model", nameless, *FEW)
    assert {path.name for path in tmp_path.iterdir()} == {"cut", "sick", "nameless", "figures", "results"}
    assert snapshot(tmp_path / "figures") == snapshot(tmp_path / "results") == {}


def test_features_are_of_models_that_a_dictionary_ships_for(tmp_path: Path, capsys) -> None:
    said = refusal(capsys, *PLANTED, "--only", "features_kept", "--out", tmp_path)
    assert "features_kept cannot be made: no dictionary of features ships for planted" in said


@pytest.mark.slow
def test_a_model_that_is_no_mamba_gets_the_figures_it_can_have(gpt2: Path, tmp_path: Path, capsys) -> None:
    assert main(["reproduce", "--model", str(gpt2), *FEW, "--out", str(tmp_path)]) == 0
    assert "fig4         left out: " in capsys.readouterr().out
    expected = {"fig3", "fig5", "fig5_greedy", "appd1", "appd3", "lens", "direct"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["reproduce", "run", "plot", "doctor", "banana"]), st.lists(st.text(max_size=8), max_size=4))
def test_no_command_line_ends_in_a_traceback(tmp_path_factory, command: str, words: list[str]) -> None:
    if command != "plot":
        words = [*words, "--model", "./absent\0"]
    here = Path.cwd()
    os.chdir(tmp_path_factory.getbasetemp())
    try:
        assert main([command, *words]) in ((0, 2) if {"-h", "--help"} & set(words) else (2,))
    finally:
        os.chdir(here)


# --- the other commands -----------------------------------------------------------------------------------------------


def test_run_then_plot(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["run", "conv_slices", "--model", str(folder), *FEW, "--layer", "1"]
    assert main(argv) == 0
    saved = tmp_path / "results" / "local" / "conv_slices"
    said = capsys.readouterr().out
    assert str(saved.relative_to(tmp_path)) in said and "largest effect:" in said
    before = snapshot(saved)
    assert main(argv) == 0 and snapshot(saved) == before
    assert main([*argv, "--out", "elsewhere"]) == 0
    assert "layer=1, and layer=0" in refusal(capsys, *argv[:-1], "0")
    assert main(["plot", str(saved)]) == 0
    assert {path.name for path in saved.iterdir()} == {"table.parquet", "meta.json", "fig8.png", "fig8.pdf"}
    (saved / "meta.json").unlink()
    (saved / "table.pkl").write_bytes(b"cos\nabort\n(tR.")
    assert "pickles are never loaded" in refusal(capsys, "plot", saved)


def test_run_on_some_channels(tmp_path: Path, monkeypatch, capsys) -> None:
    """What is stored is the function's result on those channels, says so, and is not taken for that on others."""
    monkeypatch.chdir(tmp_path)
    argv = ["run", "conv_slices", "--model", "tiny-mamba2", *FEW, "--layer", "1", "--channels"]
    assert main([*argv, "x"]) == 0
    saved = tmp_path / "results" / "tiny-mamba2" / "conv_slices"
    found, model = Result.load(saved), mamba_ioi.load_model("tiny-mamba2")
    drawn = {"pairs": found.meta["pairs"], "layer": 1, "progress": False}
    expected, everything = (
        EXPERIMENTS["conv_slices"](model, channels=channels, **drawn).table.effect for channels in ("x", None)
    )
    pd.testing.assert_series_equal(found.table.effect, expected, atol=1e-6)
    assert (found.table.effect - everything).abs().max() > 1e-3
    assert found.meta["arguments"]["channels"] == found.meta["request"]["channels"] == "x"
    assert ", layer 1, channels of x alone" in " ".join(text.get_text() for text in found.plot().texts)
    assert "channels=x, and channels=B is asked for" in refusal(capsys, *argv, "B")
    assert "channels=x, and channels=None is asked for" in refusal(capsys, *argv[:-1])


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(figure in said and row.experiment in said for figure, row in CATALOGUE.items())
    assert main(["list", "--sites"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(SITES)
    assert main(["list", "--sites", "--model", "tiny-mamba2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "mamba2: layers 0-5 mamba2"
    shapes = {line.split()[0]: line.split("]")[0].split("[")[1] for line in lines[1:-2]}
    assert [*shapes][:2] == ["embed", "resid_pre"] and [*shapes][-3:] == ["resid_post", "norm", "logits"]
    assert shapes["write"] == "B, L, H, P, N" and shapes["conv"] == "B, L, X" and "delta_1" not in shapes
    assert "H heads = 12, P head_dim = 16, G groups of heads that share B and C = 1, X channels" in lines[-1]
    assert "--model is of list --sites" in refusal(capsys, "list", "--model", "tiny")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mamba-ioi {mamba_ioi.__version__}\n"
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("reproduce", "run", "plot", "list", "doctor", "train-tiny"))
    assert main(["reproduce", "--help"]) == 0


def test_doctor(monkeypatch: pytest.MonkeyPatch, gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "planted"]) == 0
    said = capsys.readouterr()
    assert torch.__version__.split("+")[0] in said.out and "slow path              agrees" in said.out
    assert said.err == "" and "kernel mamba_ssm" in said.out and "R dt_rank" in said.out
    assert main(["doctor", "--model", "tiny-mamba2"]) == 0
    said = capsys.readouterr().out
    assert (
        "Mamba2ForCausalLM, 6 layers" in said
        and "mamba2: D d_model = 96, E d_inner = 192, N d_state = 32, H heads" in said
    )
    assert "the 26 sites stand on" in said and "slow path              agrees" in said
    assert main(["doctor", "--model", str(gpt2)]) == 0
    said = capsys.readouterr().out
    assert "no Mamba" in said and "gpt2: D d_model" in said and "attention+mlp" in said

    def differs(model):
        raise ValueError("the slow path does not reproduce planted")

    monkeypatch.setattr(mamba_ioi.models.slow_path, "check_slow_path", differs)
    assert main(["doctor", "--model", "planted"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_train_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mamba_ioi.zoo import train_tiny

    calls = []

    def train(out: Path, **arguments):
        calls.append((out, arguments))
        return {"held_out": [{"candidates": 1.0, "vocabulary": 0.5}], "minutes": 0.1}

    monkeypatch.setattr(train_tiny, "train", train)
    out = tmp_path / "new"
    assert main(["train-tiny", "--seed", "3", "--steps", "5", "--out", str(out)]) == 0
    assert calls == [(out, {"family": "mamba", "seed": 3, "steps": 5, "progress": True})]
    assert "template 1: accuracy 1.0000" in capsys.readouterr().out
    assert main(["train", "--task", "ioi", "--family", "mamba2", "--out", str(tmp_path / "other")]) == 0
    assert calls[1][1]["family"] == "mamba2"
    (out / "config.json").write_text("{}")
    assert "is there already" in refusal(capsys, "train-tiny", "--out", out)


def test_what_computes_nothing_imports_no_torch(made: Path) -> None:
    """Help, lists, plots and refusals."""
    code = f"""
import sys
from mamba_ioi.cli import main
assert main(["--version"]) == main(["--help"]) == main(["list"]) == 0
assert main(["run", "banana"]) == main(["reproduce", "--only", "fig99"]) == 2
assert main(["plot", {str(made / "results" / "fig4")!r}]) == 0
assert not {{"torch", "nnsight"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_the_lock_is_the_system_s(tmp_path: Path) -> None:
    """A lock file that is left over locks nothing; a folder that was made for nothing goes again."""
    (tmp_path / ".lock").touch()
    with pipeline.locked(tmp_path):
        pass
    with pytest.raises(KeyError), pipeline.locked(tmp_path / "new"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
