"""The arguments of the command line: which there are, and what is refused before anything else is looked at."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

BAD_INPUT = 2
"""The exit status for bad input."""
TRAINED = ("ioi", "recall", "induction", "greater_than")
"""The tasks that small models can be trained on."""
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def parse(
    commands: Mapping[str, Callable[[argparse.Namespace], int]], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read a command line, that of the process if none is given; ``command`` in what is returned is what to call.

    Args:
        commands: what to call, by the command's name, and ``--version``.
        argv: the words of the command line.

    Raises:
        SystemExit: after help was shown (0), or after one line on stderr for bad arguments (2).
    """
    parser = _Parser(
        prog="mamba-ioi",
        description="Find circuits in Mamba language models: the experiments and figures of 'Investigating the "
        "Indirect Object Identification circuit in Mamba' (arXiv 2407.14008), on any Mamba.",
        allow_abbrev=False,
    )
    parser.set_defaults(verbose=False)
    version = commands["--version"]
    parser.add_argument(
        "--version", dest="command", action="store_const", const=version, help="show the version and exit"
    )
    subparsers = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
        sub.add_argument("--verbose", action="store_true", help="show the tracebacks of errors")
        sub.set_defaults(command=commands[name])
        return sub

    sub = add("reproduce", "compute and draw every figure and write the report, going on where an earlier run stopped")
    _add_settings(sub)
    sub.add_argument("--out", type=_path, metavar="DIR", help="folder for the figures (default: figures/MODEL[-PAIRS])")
    _add_source(sub)
    sub.add_argument("--only", metavar="FIGURES", help="these figures only, such as fig4,fig8")
    sub.add_argument("--plan", action="store_true", help="say only what each figure will take, and compute none")
    sub.add_argument(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="how long it may take, about, such as 40min or 2h: takes fewer pairs, and leaves figures out if it must",
    )
    sub.add_argument(
        "--study", metavar="NAME", help="the figures of a study of several packaged models instead: recall"
    )

    sub = add("run", "compute one experiment and save its result")
    sub.add_argument("experiment", metavar="EXPERIMENT", help="its name, from 'mamba-ioi list'")
    _add_settings(sub)
    sub.add_argument(
        "--out", type=_path, metavar="DIR", help="folder of the result (default: results/MODEL/EXPERIMENT)"
    )
    help = "of a Mamba-2's conv, resample the channels of its x, B or C alone (default: all); with conv_slices"
    sub.add_argument("--channels", choices=("x", "B", "C"), help=help)
    _add_source(sub)

    sub = add("plot", "draw a saved result again, or all of a folder of 'reproduce' and its report")
    sub.add_argument(
        "folder", type=_path, metavar="DIR", help="folder with table.parquet and meta.json, or with results"
    )

    sub = add("list", "list the experiments and their figures")
    sub.add_argument("--sites", action="store_true", help="list the named activations instead")
    sub.add_argument(
        "--model", metavar="MODEL", help="whose activations, as for 'run' (default: those of any Mamba); with --sites"
    )

    add("tasks", "list the tasks that --task takes, with an example of each")

    _add_model(add("doctor", "examine versions, kernels, devices and a model's slow path"))

    sub = add("bench", "measure what the work costs on a real model's shape, with random weights")
    sub.add_argument(
        "--family",
        choices=("mamba", "mamba2", "falcon_mamba"),
        default="mamba",
        help="the shape of mamba-370m (the default), mamba2-370m, or falcon-mamba-7b, which takes 29 GB in float32",
    )
    sub.add_argument("--layers", type=_from_one, metavar="N", help="so many of them (default: all, 48, 48 or 64)")
    sub.add_argument("--prompts", type=_from_one, default=32, metavar="N", help="of the forward (default: 32)")
    sub.add_argument("--device", help="such as cuda or cuda:1 (default: cpu)")
    sub.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: float32)")
    sub.add_argument("--only", metavar="WORKS", help="these only, such as forward,sweep,h,attribution,eap,acdc,tokens")

    sub = add("attention", "write a page that shows what each token of a prompt reads of others, layer by layer")
    _add_model(sub)
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="the text, as it stands")
    sub.add_argument("--units", metavar="UNITS", help="channels or heads to show alone as well, such as 0,5")
    sub.add_argument("--out", type=_path, required=True, metavar="FILE", help="the page to write, such as a.html")

    sub = add(
        "train", "train a small model on one task: 'tiny', a subject of the recall study, or one that is not packaged"
    )
    sub.add_argument("--task", choices=TRAINED, default="ioi", help="what it learns (default: ioi)")
    _add_training(sub, "mamba or mamba2; but for ioi mamba-noconv and attention too (default: mamba)")

    sub = add("train-tiny", "train the packaged model 'tiny', or 'tiny-mamba2', anew; the same as train --task ioi")
    sub.set_defaults(task="ioi")
    _add_training(sub, "mamba2 trains 'tiny-mamba2' (default: mamba)", choices=("mamba", "mamba2"))

    arguments = parser.parse_args(argv)
    if getattr(arguments, "remote", False) and (arguments.device or arguments.dtype):
        parser.error("--device and --dtype have no meaning with --remote: the server decides on both")
    elsewhere = getattr(arguments, "data", True) or getattr(arguments, "task", True)
    if elsewhere is None and (arguments.marks or arguments.metric):
        parser.error("--marks and --metric are of pairs of another task: give --data FILE as well, or --task NAME")
    if getattr(arguments, "data", None) is not None and arguments.pairs is not None:
        parser.error("--pairs has no meaning with --data: all rows of the file are taken")
    if getattr(arguments, "sites", True) is False and arguments.model is not None:
        parser.error("--model is of list --sites: the experiments are the same for every model")
    if getattr(arguments, "study", None) is not None:
        single = {"data": None, "task": None, "layer": None, "remote": False, "model": "tiny"}
        for name in (name for name, usual in single.items() if getattr(arguments, name) != usual):
            parser.error(f"--{name} has no meaning with --study, which has subjects and prompts of its own")
    if arguments.command is None:
        parser.error(f"a command is needed: {', '.join(name for name in commands if not name.startswith('-'))}")
    return arguments


def one_line(text: str) -> str:
    """The text's lines that are not empty, joined."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


class _Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"mamba-ioi: error: {one_line(message)}\n")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="tiny", help="tiny, planted, another packaged model, a directory or a Hub id (default: tiny)"
    )
    parser.add_argument("--device", help="such as cuda or cuda:1 (default: cpu)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--remote",
        nargs="?",
        const=True,
        default=False,
        metavar="HOST",
        help="run on an NDIF server: this URL, or that of NDIF_HOST, or the public one; the API key is NDIF_API_KEY",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Where the pairs of another task come from, and how they are looked at."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--data", type=_path, metavar="FILE", help="pairs of another task: a .jsonl, .csv or .parquet file"
    )
    either.add_argument(
        "--task", metavar="NAME", help="pairs of another task, from 'mamba-ioi tasks'; --pairs of them (default: 80)"
    )
    help = "with --data or --task: go by these, such as subject,verb+1,last (default: all marks where rows differ)"
    parser.add_argument("--marks", type=_names, metavar="MARKS", help=help)
    parser.add_argument("--metric", metavar="M", help="likewise: nld, logit_diff, prob_diff or margin")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--pairs",
        type=_from_one,
        metavar="N",
        help="pairs of prompts (default: as 'mamba-ioi list' says, which gives the paper's number where it is smaller)",
    )
    parser.add_argument("--seed", type=_from_zero, default=27, help="of the prompts (default: 27)")
    parser.add_argument("--layer", type=_from_zero, help="layer to look at (default: the bottleneck that is found)")
    parser.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="how much to use, about, such as 4GB or 500MB (default: half of what is free); no number depends on it",
    )


def _add_training(parser: argparse.ArgumentParser, families: str, choices: Sequence[str] | None = None) -> None:
    parser.add_argument("--family", choices=choices, default="mamba", metavar=None if choices else "F", help=families)
    parser.add_argument("--seed", type=_from_zero, default=0, help="of the weights and prompts (default: 0)")
    parser.add_argument("--out", type=_path, metavar="DIR", required=True, help="new folder for the model")
    parser.add_argument(
        "--steps", type=_from_one, metavar="N", help="optimizer steps (default: those of the packaged one)"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between, not {text!r}")
    return names


def _from_zero(text: str) -> int:
    return _whole_number(text, 0)


def _from_one(text: str) -> int:
    return _whole_number(text, 1)


def _whole_number(text: str, least: int) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    parts = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMGT]?)i?B?", text, re.IGNORECASE)
    size = int(float(parts[1]) * 1024 ** " KMGT".index(parts[2].upper() or " ")) if parts else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 4GB or 500MB, not {text!r}")
    return size


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(s|min|h)", text)
    seconds = float(parts[1]) * {"s": 1, "min": 60, "h": 3600}[parts[2]] if parts else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 40min or 2h, not {text!r}")
    return seconds


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path of a folder")
    return Path(os.path.expanduser(text))
