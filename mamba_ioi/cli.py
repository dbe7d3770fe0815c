"""The command line, `mamba-ioi`: reproduce, run, plot, list, tasks, doctor, bench, attention, train and train-tiny.

Exit status 0; 1 if a figure failed or `doctor` found something wrong; 2, with one line on stderr, for bad input. What
needs torch is imported by the commands that compute, so that help, lists and refusals come at once.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import BAD_INPUT, one_line, parse
from .catalogue import CATALOGUE, EVERY, STUDIES
from .reproduce.makers import Settings, prepare, with_layer
from .reproduce.source import Source

if TYPE_CHECKING:
    import pandas as pd

    from .reproduce.plan import Plan
    from .reproduce.run import Outcome
    from .trace.sites import SiteInfo

logger = logging.getLogger(__name__)

_MEASURES = ("effect", "success", "similarity")
_SHOWN_ROWS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process if none is given; return its exit status."""
    _open_streams()
    try:
        arguments = parse(COMMANDS, argv)
    except SystemExit as ending:  # argparse has said why: help or bad arguments
        return int(ending.code or 0)
    with _logging(arguments.verbose), _plain_backend():
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
    from .reproduce.plan import plan_of
    from .reproduce.run import reproduce
    from .reproduce.study import reproduce_study

    settings = replace(_settings(arguments), budget=arguments.budget)
    if arguments.study is not None:
        if arguments.plan or arguments.budget is not None:
            raise ValueError("a study takes minutes; --plan and --budget are for the figures of one model")
        out = arguments.out or Path("figures", arguments.study)
        with _quiet():
            outcomes = reproduce_study(arguments.study, settings, out, arguments.only, _tell)
        return _account(outcomes, out)
    out = arguments.out or Path("figures", "-".join(_folders(settings)))
    if arguments.plan:
        with _quiet():
            _announce(plan_of(settings, arguments.only))
        return 0
    with _quiet():
        outcomes = reproduce(settings, out, arguments.only, _tell, _announce)
    return _account(outcomes, out)


def _run(arguments: argparse.Namespace) -> int:
    from .reproduce.folder import ANSWERS, discard_answers, locked, stored_result
    from .reproduce.identity import folder_identity, request
    from .reproduce.run import compute

    figures = {row.experiment: figure for figure, row in CATALOGUE.items()}
    figure = figures.get(arguments.experiment)
    if figure is None:
        raise ValueError(f"there is no experiment {arguments.experiment!r}; there are {', '.join(figures)}")
    settings = _settings(arguments)
    if settings.layer is not None and not CATALOGUE[figure].takes_layer:
        raise ValueError(f"{arguments.experiment} looks at no single layer; --layer has no meaning for it")
    if arguments.channels is not None and not CATALOGUE[figure].takes_channels:
        raise ValueError(f"{arguments.experiment} tells no channels apart; --channels has no meaning for it")
    settings = replace(settings, channels=arguments.channels)
    out = arguments.out or Path("results", *_folders(settings), arguments.experiment)
    asked = request(figure, settings, folder_identity(settings))
    if settings.source is not None:
        _check_on_pairs(arguments)
    with locked(out, "--out"), _quiet():
        result = stored_result(out, asked)
        if result is None:
            from .remote.requests import answers_in

            model, given = prepare(settings, [figure])
            if CATALOGUE[figure].needs_mamba:
                model.require_mamba(f"experiments such as {arguments.experiment}")
            with answers_in(model, out / ANSWERS, asked):
                result = compute(figure, model, with_layer(figure, model, settings, given), asked, given)
            result.save(out)
            discard_answers(out)
            _say(f"saved in {out}; draw it with: mamba-ioi plot {out}")
        else:
            _say(f"already in {out}")
    _say(_summary(result.table))
    return 0


def _source(arguments: argparse.Namespace) -> Source | None:
    """Where the pairs of another task come from; None if the paper's are asked for."""
    if arguments.data is None and arguments.task is None:
        return None
    return Source(data=arguments.data, task=arguments.task, rows=arguments.pairs, seed=arguments.seed)


def _check_on_pairs(arguments: argparse.Namespace) -> None:
    """Refuse an experiment that takes no pairs of another task, or no marks or metric, before a model is loaded."""
    from .experiments import EXPERIMENTS

    takes = [name for name, one in EXPERIMENTS.items() if not one.needs_names]
    if arguments.experiment not in takes:
        what, option = ("from a file", "--data") if arguments.task is None else ("of another task", "--task")
        raise ValueError(f"{arguments.experiment} takes no pairs {what}; {option} is for {', '.join(takes)}")
    known = inspect.signature(EXPERIMENTS[arguments.experiment].work).parameters
    measured = "metric" in known or "held_out" in known  # circuits are found by the pairs' own metric
    for name, there in (("marks", "marks" in known), ("metric", measured)):
        if getattr(arguments, name) and not there:
            raise ValueError(f"{arguments.experiment} has no {name}; --{name} has no meaning for it")


def _plot(arguments: argparse.Namespace) -> int:
    from .figures import save_companions, save_figure
    from .reproduce.folder import RESULTS
    from .reproduce.run import redraw
    from .result import Result

    if (arguments.folder / RESULTS).is_dir():
        return _account(redraw(arguments.folder, _tell), arguments.folder)
    result = Result.load(arguments.folder)
    figure = (result.meta.get("request") or {}).get("figure")
    stem = figure if figure in EVERY else _safe(result.meta["experiment"])
    save_companions(result, arguments.folder / stem)
    for path in save_figure(result.plot(), arguments.folder / stem):
        _say(str(path))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    if arguments.sites:
        _say(_sites(arguments.model))
        return 0
    for figure, row in CATALOGUE.items():
        pairs = "" if row.pairs is None else f"; {row.pairs} pairs {row.per_pair}".rstrip()
        pairs += f" (the paper: {row.paper})" if row.paper else ""
        needs = "" if row.needs_mamba else "; any causal language model"
        layer = "; one layer" if row.takes_layer else ""
        layer += "; some channels of a Mamba-2's conv" if row.takes_channels else ""
        names = "; the paper's prompts only" if row.needs_names else ""
        _say(f"{figure:12} {row.experiment:27} {row.shows}{pairs}{layer}{needs}{names}")
        _say(textwrap.indent(f"columns: {', '.join(row.columns)}", " " * 13))
    for study in STUDIES.values():
        _say(f"\n--study {study.name}: {study.about} ({study.source})")
        for figure, row in study.catalogue.items():
            _say(f"{figure:19} {row.shows}; {row.pairs} {row.per_pair}")
            _say(textwrap.indent(f"columns: {', '.join(row.columns)}", " " * 20))
    return 0


def _sites(name: str | None) -> str:
    """The table of sites, a Mamba's or those of a model, of which it says which layers have them."""
    from .doctor import explained, numbered
    from .trace.sites import SITES

    head = ["site", "shape", "of", "what it is"]
    if name is None:
        rows = [[*_site_row(site), site.description] for site in SITES.values()]
        return "\n".join([_aligned([head, *rows]), explained(_letters(SITES.values()))])
    from .doctor import layers_by_kind
    from .models.model import load_model

    with _quiet():
        model = load_model(name)
        there = [model.sites_of(layer) for layer in range(model.n_layers)]
    rows, sites = [], []
    for known in model.known_sites().values():
        layers = [layer for layer, names in enumerate(there) if known.name in names]
        if layers or known.owner == "model":
            where = "" if known.owner == "model" else "all" if len(layers) == model.n_layers else numbered(layers)
            rows.append([*_site_row(known), where, known.description])
            sites.append(known)
    head.insert(3, "layers")
    kinds = f"{model.family}: {layers_by_kind(model)}"
    return "\n".join([_aligned([head, *rows]), kinds, explained(_letters(sites), model.sizes())])


def _site_row(site: SiteInfo) -> list[str]:
    return [site.name, f"[{', '.join(site.shape)}]", site.owner]


def _letters(sites: Iterable[SiteInfo]) -> set[str]:
    return {letter for site in sites for letter in site.shape}


def _tasks(arguments: argparse.Namespace) -> int:
    from .tasks import TASKS

    for name, task in TASKS.items():
        _say(f"{name:12} {task.about} ({task.source})")
        for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer")):
            text = task.example[side].strip().replace("\n", "\\n")
            _say(f"{'':13}{side}: {text} -> {_shortened(task.example[answer])}")
        if task.options:
            _say(f"{'':13}options: {', '.join(f'{option}={default!r}' for option, default in task.options.items())}")
    return 0


def _shortened(answers: str | Sequence[str]) -> str:
    """An answer without the space before it, or the first, second and last of many."""
    listed = [answers] if isinstance(answers, str) else list(answers)
    return ", ".join(answer.strip() for answer in (listed if len(listed) < 4 else [*listed[:2], "…", listed[-1]]))


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    wrong = []
    with _quiet():
        for finding in examine(
            arguments.model, device=arguments.device, dtype=arguments.dtype, remote=arguments.remote
        ):
            _say(f"{finding.item:22} {one_line(finding.found)}")
            if not finding.well:
                wrong.append(finding)
    for finding in wrong:
        _complain(f"{finding.item} is not as it should be: {one_line(finding.found)}")
    if not wrong:
        _say("all is well")
    return 1 if wrong else 0


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import bench

    only = None if arguments.only is None else [name.strip() for name in arguments.only.split(",")]
    sizes = {"family": arguments.family, "layers": arguments.layers, "prompts": arguments.prompts}
    with _quiet():
        for line in bench(**sizes, device=arguments.device, dtype=arguments.dtype, only=only):
            _say(f"{line.work:36} {line.ratio:8.3f} of {line.to} ({line.times})")
    return 0


def _attention(arguments: argparse.Namespace) -> int:
    from .experiments.token_page import token_page
    from .files import replace_files
    from .models.model import load_model

    units = None if arguments.units is None else _numbers(arguments.units)
    with _quiet():
        chosen = {"device": arguments.device, "dtype": arguments.dtype, "remote": arguments.remote}
        page = token_page(load_model(arguments.model, **chosen), arguments.prompt, units=units)
    replace_files(arguments.out.parent, {arguments.out.name: page.encode("utf-8", "backslashreplace")})
    _say(f"saved as {arguments.out}")
    return 0


def _numbers(words: str) -> list[int]:
    """Whole numbers with commas between."""
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"units are whole numbers with commas between, such as 0,5, not {words!r}") from None


def _train(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a folder that is new or empty to write the model to")
    from .zoo import train_small, train_tiny

    small = {} if arguments.task == "ioi" else {"task": arguments.task}
    room, told = (train_small, _told_of_small) if small else (train_tiny, _told_of_ioi)
    room.check_family(arguments.family, **small)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # a folder that cannot be written is better known before the training
        pass
    with _quiet():
        chosen = {"family": arguments.family, "seed": arguments.seed, "steps": arguments.steps}
        report = room.train(out, **chosen, **small, progress=True)
    for line in told(report):
        _say(line)
    _say(f"saved in {out} after {report['minutes']} minutes of one core")
    return 0


def _told_of_ioi(report: Mapping[str, Any]) -> Iterator[str]:
    for number, measured in enumerate(report["held_out"], start=1):
        yield (
            f"template {number}: accuracy {measured['candidates']:.4f} over the prompt's names, "
            f"{measured['vocabulary']:.4f} over the vocabulary, on held-out triples"
        )


def _told_of_small(report: Mapping[str, Any]) -> Iterator[str]:
    from .zoo.lessons import LESSONS

    for kind, accuracy in report["accuracy"].items():
        yield f"{LESSONS[report['task']].asked[1]} {kind}: accuracy {accuracy:.4f} over the vocabulary"


def _version(arguments: argparse.Namespace) -> int:
    from . import __version__

    _say(f"mamba-ioi {__version__}")
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "reproduce": _reproduce,
    "run": _run,
    "plot": _plot,
    "list": _list,
    "tasks": _tasks,
    "doctor": _doctor,
    "bench": _bench,
    "attention": _attention,
    "train": _train,
    "train-tiny": _train,
    "--version": _version,
}


def _settings(arguments: argparse.Namespace) -> Settings:
    names = ("model", "pairs", "seed", "layer", "marks", "metric", "device", "dtype", "memory", "remote")
    chosen = {name: getattr(arguments, name) for name in names}
    return Settings(**chosen, source=_source(arguments), progress=sys.stderr.isatty())


def _folders(settings: Settings) -> list[str]:
    """Names for a folder of its own: the model's, and that of the pairs' file or task."""
    source = [] if settings.source is None else [_safe(Path(settings.source.name).stem)]
    return [_safe(settings.model), *source]


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def _announce(plan: Plan) -> None:
    from .reproduce.plan import said

    for line in said(plan):
        _say(line)


def _tell(outcome: Outcome) -> None:
    _say(f"{outcome.figure:12} {outcome.done}")


def _account(outcomes: Sequence[Outcome], out: Path) -> int:
    """Say what failed and how much is there; the exit status."""
    failed = [(outcome.figure, outcome.error) for outcome in outcomes if outcome.error is not None]
    for figure, error in failed:
        _complain(f"{figure} failed: {type(error).__name__}: {_sentence(error)}")
    figures = [outcome for outcome in outcomes if outcome.figure in EVERY]
    _say(f"{sum(outcome.there for outcome in figures)} of {len(figures)} figures are in {out}")
    return 1 if failed else 0


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
    folder = Path(os.path.expanduser(name))
    text = folder.resolve().name if folder.is_dir() else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:100] or "model"


def _sentence(error: BaseException) -> str:
    """What an error says, on one line; for errors of the system, what happened and to which file."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    return one_line(str(error)) or type(error).__name__


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

    level, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        yield
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()


def _open_streams() -> None:
    """Let standard streams that the caller has closed lead nowhere; a file that we open would take their place else."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def _plain_backend() -> Iterator[None]:
    """Without the backend that the environment names, such as a notebook kernel's: figures go to files alone."""
    named = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        if named is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = named


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
