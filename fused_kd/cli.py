"""The command line, `fused-kd`: what this installation can do (`info`), which loss somebody's own is (`identify`), and
what the loss does (`demo`, `paper`)."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import fused_kd
from fused_kd import demo, info


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fused-kd", description=fused_kd.__doc__)
    parser.add_argument("--version", action="version", version=f"fused_kd {fused_kd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "versions, devices, and the backends with what each is built for, or why it is missing"
    command = commands.add_parser("info", help=text, description=text)
    command.set_defaults(run=_info)

    text = "which FusedKDLoss a loss function is, proved on random inputs, and what is odd about it"
    command = commands.add_parser("identify", help=text, description=text)
    command.add_argument("loss", metavar="MODULE:FUNCTION", help="from here or from what is installed")
    text = "what its arguments are, such as student,teacher,labels,mask (told from their names, and by trying)"
    command.add_argument("--arguments", type=lambda names: names.split(","), metavar="ROLE,ROLE...", help=text)
    command.set_defaults(run=_identify)

    text = "distils handwritten digits, then measures the loss at a language model's vocabulary (under two minutes)"
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument("--output", type=Path, default=Path("fused-kd-demo.png"), help="the picture (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the split, the networks and the logits (%(default)s)")
    command.add_argument("--quick", action="store_true", help="a few seconds: shorter training, fewer rows")
    command.add_argument("--rows", type=_rows, help=f"rows of logits in the second part ({demo.ROWS})")
    command.set_defaults(run=_demo)

    text = "the experiments of Hinton, Vinyals, Dean 2015 on handwritten digits, beside its figures (a few minutes)"
    command = commands.add_parser("paper", help=text, description=text)
    command.add_argument("--output", type=Path, default=Path("fused-kd-paper.png"), help="the picture (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="the first of the seeds (%(default)s)")
    command.add_argument("--seeds", type=_seeds, help=f"how many, each with its own split and networks ({demo.SEEDS})")
    command.add_argument("--quick", action="store_true", help="a few seconds, and no meaning: hardly any training")
    command.set_defaults(run=_paper)
    return parser


def _rows(text: str) -> int:
    return _at_least(demo.FEWEST_ROWS, text)


def _seeds(text: str) -> int:
    return _at_least(demo.FEWEST_SEEDS, text)


def _at_least(fewest: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < fewest:
        raise argparse.ArgumentTypeError(f"must be at least {fewest}, got {number}")
    return number


def _info(arguments: argparse.Namespace) -> int:
    print(info.report())
    return 0


def _identify(arguments: argparse.Namespace) -> int:
    """1 where nothing was proved, 2 where there is nothing to identify."""
    try:
        report = fused_kd.identify(_imported(arguments.loss), arguments=arguments.arguments)
    except ValueError as error:
        print(f"fused-kd identify: {error}", file=sys.stderr)
        return 2
    print(report, end="")
    return 0 if report.proved else 1


def _imported(name: str) -> Callable[..., Any]:
    """Raises ValueError where there is no such thing."""
    module, _, path = name.partition(":")
    if not module or not path:
        raise ValueError(f"the loss must be given as MODULE:FUNCTION, such as my_module:my_loss, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if isinstance(found, type) or not callable(found):
        raise ValueError(f"{name} must be a function or an object that can be called, got {found!r}")
    return found


def _demo(arguments: argparse.Namespace) -> int:
    problem = demo.problem(arguments.output)
    if problem is not None:
        print(f"fused-kd demo: {problem}", file=sys.stderr)
        return 1
    rows = arguments.rows or (demo.QUICK_ROWS if arguments.quick else demo.ROWS)
    demo.run(arguments.output, seed=arguments.seed, quick=arguments.quick, rows=rows)
    return 0


def _paper(arguments: argparse.Namespace) -> int:
    problem = demo.problem(arguments.output)
    if problem is not None:
        print(f"fused-kd paper: {problem}", file=sys.stderr)
        return 1
    seeds = arguments.seeds or (demo.QUICK_SEEDS if arguments.quick else demo.SEEDS)
    demo.run_paper(arguments.output, seed=arguments.seed, seeds=seeds, quick=arguments.quick)
    return 0
