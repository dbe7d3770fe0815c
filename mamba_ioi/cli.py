"""The command line: `mamba-ioi reproduce`, `run`, `plot`, `list`, `doctor` and `train-tiny`.

Exit status 0; 1 if a figure failed or `doctor` found something wrong; 2, with one line on stderr, for bad input. What
needs torch is imported by the commands that compute, so that help, lists and refusals come at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .makers import MAKERS, Settings, prepare, with_layer

if TYPE_CHECKING:
    import pandas as pd

    from .reproduce import Outcome

logger = logging.getLogger(__name__)

BAD_INPUT = 2
_MEASURES = ("effect", "success", "similarity")
_SHOWN_ROWS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process if none is given; return its exit status."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as ending:  # argparse has said why: help, the version, or bad arguments
        return int(ending.code or 0)
    with _logging(arguments.verbose):
        try:
            return arguments.command(arguments)
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, OSError, ImportError) as error:
            logger.debug("refused", exc_info=error)
            _complain(f"error: {_sentence(error)}")
            return BAD_INPUT
        except KeyboardInterrupt:
            _complain("interrupted; what is complete is kept, and the same command goes on from there")
            return 130


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def _reproduce(arguments: argparse.Namespace) -> int:
    from .reproduce import reproduce

    def report(outcome: Outcome) -> None:
        _say(f"{outcome.figure:12} {outcome.done}")

    out = arguments.out or Path("figures", _safe(arguments.model))
    with _quiet():
        outcomes = reproduce(_settings(arguments), out, arguments.only, report)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        _complain(f"{outcome.figure} failed: {type(outcome.error).__name__}: {_sentence(outcome.error)}")
    _say(f"{sum(outcome.error is None for outcome in outcomes)} of {len(outcomes)} figures are in {out}")
    return 1 if failed else 0


def _run(arguments: argparse.Namespace) -> int:
    from .reproduce import compute, locked, model_identity, request, stored_result

    figures = {maker.experiment: figure for figure, maker in MAKERS.items()}
    figure = figures.get(arguments.experiment)
    if figure is None:
        raise ValueError(f"there is no experiment {arguments.experiment!r}; there are {', '.join(figures)}")
    settings = _settings(arguments)
    if settings.layer is not None and not MAKERS[figure].takes_layer:
        raise ValueError(f"{arguments.experiment} looks at no single layer; --layer has no meaning for it")
    out = arguments.out or Path("results", _safe(arguments.model), arguments.experiment)
    asked = request(figure, settings, model_identity(settings))
    with locked(out), _quiet():
        result = stored_result(out, asked)
        if result is None:
            model, usable = prepare(settings, [figure])
            if not usable:
                model.require_mamba(f"experiments such as {arguments.experiment}")
            result = compute(figure, model, with_layer(figure, model, settings), asked)
            result.save(out)
            _say(f"saved in {out}; draw it with: mamba-ioi plot {out}")
        else:
            _say(f"already in {out}")
    _say(_summary(result.table))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from .figures import save_figure
    from .result import Result

    result = Result.load(arguments.folder)
    figure = (result.meta.get("request") or {}).get("figure")
    stem = figure if figure in MAKERS else _safe(result.meta["experiment"])
    for path in save_figure(result.plot(), arguments.folder / stem):
        _say(str(path))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    if arguments.sites:
        from .sites import SITES

        rows = [(name, f"[{', '.join(site.shape)}]", site.owner, site.description) for name, site in SITES.items()]
        _say(_aligned([("site", "shape", "of", "what it is"), *rows]))
        _say("B batch, L positions, D d_model, E d_inner, N d_state, R dt_rank, K taps of the conv, V vocabulary")
        return 0
    for figure, maker in MAKERS.items():
        pairs = "" if maker.pairs is None else f"; {maker.pairs} pairs {maker.per_pair}".rstrip()
        needs = "" if maker.needs_mamba else "; any causal language model"
        layer = "; one layer" if maker.takes_layer else ""
        _say(f"{figure:12} {maker.experiment:27} {maker.shows}{pairs}{layer}{needs}")
        _say(textwrap.indent(f"columns: {', '.join(maker.columns)}", " " * 13))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    wrong = []
    with _quiet():
        for finding in examine(arguments.model, device=arguments.device, dtype=arguments.dtype):
            _say(f"{finding.item:22} {_one_line(finding.found)}")
            if not finding.well:
                wrong.append(finding)
    for finding in wrong:
        _complain(f"{finding.item} is not as it should be: {_one_line(finding.found)}")
    if not wrong:
        _say("all is well")
    return 1 if wrong else 0


def _train_tiny(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a folder that is new or empty to write the model to")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # a folder that cannot be written is better known before the training
        pass
    from .zoo.train_tiny import STEPS, train

    with _quiet():
        steps = STEPS if arguments.steps is None else arguments.steps
        report = train(out, seed=arguments.seed, steps=steps, progress=True)
    for number, measured in enumerate(report["held_out"], start=1):
        _say(
            f"template {number}: accuracy {measured['candidates']:.4f} over the prompt's names, "
            f"{measured['vocabulary']:.4f} over the vocabulary, on held-out triples"
        )
    _say(f"saved in {out} after {report['minutes']} minutes")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"error: {_one_line(message)}")
        raise SystemExit(BAD_INPUT)


class _Version(argparse.Action):
    """Show the version; the package is asked for it only then."""

    def __call__(self, parser, *_) -> NoReturn:
        from . import __version__

        _say(f"mamba-ioi {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mamba-ioi",
        description="Find circuits in Mamba language models: the experiments and figures of 'Investigating the "
        "Indirect Object Identification circuit in Mamba' (arXiv 2407.14008), on any Mamba.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
        sub.add_argument("--verbose", action="store_true", help="show the tracebacks of errors")
        sub.set_defaults(command=command)
        return sub

    sub = add("reproduce", _reproduce, "compute and draw every figure, going on where an earlier run stopped")
    _add_settings(sub)
    sub.add_argument("--out", type=_path, metavar="DIR", help="folder for the figures (default: figures/MODEL)")
    sub.add_argument("--only", metavar="FIGURES", help="these figures only, such as fig4,fig8")

    sub = add("run", _run, "compute one experiment and save its result")
    sub.add_argument("experiment", metavar="EXPERIMENT", help="its name, from 'mamba-ioi list'")
    _add_settings(sub)
    sub.add_argument(
        "--out", type=_path, metavar="DIR", help="folder of the result (default: results/MODEL/EXPERIMENT)"
    )

    sub = add("plot", _plot, "draw a saved result again, into its folder")
    sub.add_argument("folder", type=_path, metavar="DIR", help="folder with table.parquet and meta.json")

    sub = add("list", _list, "list the experiments and their figures")
    sub.add_argument("--sites", action="store_true", help="list the named activations instead")

    sub = add("doctor", _doctor, "examine versions, kernels, devices and a model's slow path")
    _add_model(sub)

    sub = add("train-tiny", _train_tiny, "train the packaged model 'tiny' anew")
    sub.add_argument("--seed", type=_seed, default=0, help="of the weights and prompts (default: 0)")
    sub.add_argument("--out", type=_path, metavar="DIR", required=True, help="new folder for the model")
    sub.add_argument(
        "--steps", type=_positive, metavar="N", help="optimizer steps (default: those of the packaged model)"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny, planted, a directory or a Hub id (default: tiny)")
    parser.add_argument("--device", help="such as cuda or cuda:1 (default: cpu)")
    parser.add_argument("--dtype", help="such as bfloat16 (default: the checkpoint's)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--pairs", type=_positive, metavar="N", help="pairs of prompts (default: the paper's number)")
    parser.add_argument("--seed", type=_seed, default=27, help="of the prompts (default: 27)")
    parser.add_argument("--layer", type=_seed, help="layer to look at (default: the bottleneck that is found)")


def _settings(arguments: argparse.Namespace) -> Settings:
    chosen = {name: getattr(arguments, name) for name in ("model", "pairs", "seed", "layer", "device", "dtype")}
    return Settings(**chosen, progress=sys.stderr.isatty())


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return int(text)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path of a folder")
    return Path(text)


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def _summary(table: pd.DataFrame) -> str:
    """The whole of a short table, the rows with the largest values of a long one."""
    head = f"{len(table)} rows: {', '.join(table.columns)}"
    measure = next((name for name in _MEASURES if name in table.columns), None)
    if len(table) > _SHOWN_ROWS and measure is not None:
        head, table = f"{head}\nlargest {measure}:", table.nlargest(_SHOWN_ROWS, measure)
    elif len(table) > _SHOWN_ROWS:
        head, table = f"{head}\nfirst rows:", table.head(_SHOWN_ROWS)
    return f"{head}\n{table.to_string(index=False, float_format='{:.4f}'.format, max_colwidth=40)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _safe(name: str) -> str:
    """A model's name as the name of a folder: the last part of a directory's path, a Hub id with - for /."""
    text = Path(name).resolve().name if "\0" not in name and Path(name).is_dir() else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:100] or "model"


def _sentence(error: BaseException) -> str:
    """What an error says, on one line; for errors of the system, what happened and to which file."""
    if isinstance(error, OSError) and error.strerror:
        return _one_line(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _say(text: str) -> None:
    """Print, whatever characters the output can take."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _complain(text: str) -> None:
    print(f"mamba-ioi: {text}", file=sys.stderr, flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' notes on loading and on kernels that are not installed; `doctor` says what there is."""
    from transformers.utils import logging as notes

    level = notes.get_verbosity()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        yield
    finally:
        notes.set_verbosity(level)
        notes.enable_progress_bar()


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Send the package's log to stderr: warnings, and with ``verbose`` everything."""
    package, handler = logging.getLogger("mamba_ioi"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mamba-ioi: %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
