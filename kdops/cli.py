"""The command line: ``kdops info``, ``kdops student-checkpoint``, ``kdops teacher-order``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdops._version import __version__

__all__ = ["main"]


#: The arguments of order_teachers that the user's function may return.
_ORDER_ARGUMENTS = ("student", "teachers", "batches", "layers", "strongest", "run")


class _Refused(Exception):
    """A user error: its message is printed without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or 1 after a user error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except _Refused as error:
        print(f"kdops {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _refusals_of(function: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors that a function raises itself into plain messages; other errors keep their traceback."""
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) or str(error).startswith(function):
            raise _Refused(str(error).removeprefix(f"{function}: ")) from error
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdops", description="Fused feature-distillation losses: tools around them.")
    parser.add_argument("--version", action="version", version=f"kdops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_student_checkpoint(commands)
    _add_teacher_order(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction) -> None:
    text = "print versions, devices and the kernel that each loss uses on each device, for a bug report"
    commands.add_parser("info", help=text, description=text.capitalize() + ".").set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    from kdops._info import report

    print(report())


def _add_student_checkpoint(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "student-checkpoint",
        help="extract the student from a checkpoint of a distillation run",
        description="Write the student of a distillation run's checkpoint as a checkpoint that the plain network "
        "loads: its weights and meta are kept; teacher, connectors, optimizer and everything else are dropped.",
        epilog="Layouts: kdops ('student.' beside 'distiller.'), mmrazor ('architecture.' beside 'teacher.' and "
        "'distiller.'), mgd (MGD and MTPD: 'student.' beside 'teacher.' and 'distill_losses.'). Where mmengine's "
        "EMAHook was used, the averaged weights are taken.",
    )
    command.add_argument("source", metavar="IN", help="checkpoint of a distillation run, written by torch.save")
    command.add_argument("target", metavar="OUT", help="file to write (through a temporary file beside it)")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists (it may be IN itself)")
    command.add_argument(
        "--layout",
        metavar="NAME",
        help="kdops, mmrazor or mgd: assume this layout, whatever else is in the file (default: detect it, and "
        "fail on a file with unknown parts)",
    )
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read a file that contains more than tensors and plain values, as OpenMMLab's checkpoints do; such a "
        "file can run arbitrary code: use it only for files that you trust",
    )
    command.set_defaults(run=_student_checkpoint)


def _student_checkpoint(options: argparse.Namespace) -> None:
    from kdops.distill.checkpoints import student_checkpoint

    with _refusals_of("student_checkpoint", OSError, ValueError):
        done = student_checkpoint(
            options.source,
            options.target,
            layout=options.layout,
            force=options.force,
            allow_pickle=options.allow_pickle,
        )
    print(done)


def _add_teacher_order(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "teacher-order",
        help="in which order to learn from several teachers (progressive distillation)",
        description="Print the cost of adapting each network's features to each teacher's, and the order of teachers "
        "that follows from it. See kdops.distill.order_teachers for the definition.",
        epilog="NETWORKS is executed as Python code. Its function takes no arguments and returns a "
        "dict of arguments of order_teachers: student (a module), teachers (modules by name, the strongest last), "
        "batches (an iterable), and perhaps layers, strongest and run.",
    )
    command.add_argument(
        "networks",
        metavar="NETWORKS",
        help="where the networks come from: FILE.py or package.module, followed by :function if that is not called "
        "'networks'",
    )
    command.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to compare, the same in all networks")
    command.add_argument("--strongest", metavar="NAME", help="teacher at the end of the order (default: the last)")
    command.add_argument("--batches", type=int, metavar="N", help="look at the first N batches only")
    command.add_argument("--ridge", type=float, metavar="R", help="regularisation of the linear maps")
    command.add_argument("--plot", metavar="FILE", help="draw the costs to this image (needs matplotlib)")
    command.set_defaults(run=_teacher_order)


def _teacher_order(options: argparse.Namespace) -> None:
    from kdops.distill import order_teachers

    function = _function(options.networks)
    given = function()
    if not isinstance(given, Mapping) or not {"student", "teachers", "batches"} <= set(given) <= set(_ORDER_ARGUMENTS):
        came = f"a dict of {sorted(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
        raise _Refused(
            f"{options.networks} must return a dict of student, teachers, batches and perhaps layers, strongest and "
            f"run, got {came}"
        )
    asked = {name: getattr(options, name) for name in ("layers", "strongest", "ridge", "plot")}
    arguments = {**given, **{name: value for name, value in asked.items() if value is not None}}
    if arguments.get("layers") is None:
        raise _Refused(f"the layers to compare must be given, by --layers or by {options.networks}, got none")
    batches = itertools.islice(arguments.pop("batches"), options.batches)
    with _refusals_of("order_teachers", ValueError, TypeError, RuntimeError):
        order_teachers(arguments.pop("student"), arguments.pop("teachers"), batches, **arguments)


def _function(reference: str) -> Any:
    """The function that FILE.py:function or package.module:function names."""
    place, _, name = reference.partition(":")
    name = name or "networks"
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise _Refused(f"{place} must have a function '{name}', got {function!r}")
    return function


def _file(path: Path) -> Any:
    if not path.is_file():
        raise _Refused(f"there must be a file to read the networks from, got no file at {path}")
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, so that it can import what lies beside it
    spec = importlib.util.spec_from_file_location("__kdops_networks__", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up a class's module there
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, "")  # a console script does not have the current folder on its path
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise _Refused(f"there must be a module '{name}' on the path, got none") from error
