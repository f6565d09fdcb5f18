"""The command line: flags from dataclasses (tyro), exit codes, and errors of one line each.

Importing this module does not import torch, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import os
import re
import select
import shlex
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO, TypeVar

from tyro.conf import OmitArgPrefixes, Positional

from dnas_ens.errors import UserError
from dnas_ens.run.files import unwritable
from dnas_ens.run.machine import keep_freed_memory
from dnas_ens.run.ranks import is_first, launched

T = TypeVar("T")

# What a shell reports for a program that SIGPIPE has ended.
_BROKEN_PIPE = 128 + signal.SIGPIPE
#: A disk that is full or read-only: a matter of the user's machine.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
#: A path that the user's rights or the system's limits keep out of reach.
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
_HELP = {"-h", "--help"}


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, except for its exit code."""


def parse(command: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Read a command's options into its dataclass.

    Args:
        command: The dataclass; each field is a flag, its docstring the help. The fields of a nested one are
            `--section.field`, or flat where it is marked `tyro.conf.OmitArgPrefixes`. `--field` and `--no-field` set
            a field of the type `bool | None`.
        argv: What was typed after the program's name.
        prog: The program's name as typed, such as `python -m dnas_ens.search`.
        description: First lines of `--help`.
        default: Values of the fields that are not given; None where fields have defaults of their own.

    Raises:
        UserError: A flag is unknown (the nearest is named) or a value does not fit.
        SystemExit: With 0, after `--help` was printed.
    """
    flags = _flags(command)
    if not _HELP & set(argv):
        # Before tyro, which may take a mistyped flag for the value of a positional argument.
        _refuse_unknown_flag(argv, flags, prog)
        argv = _with_values(argv, [flag for flag, kind in flags.items() if kind == bool | None])
    options = {} if default is None else {"default": default}
    parsed, unknown = _tyro(command, argv, prog=prog, description=description, **options)
    if unknown:
        meant = f"If it is the data, type --data {shlex.quote(unknown[0])}. " if "--data" in flags else ""
        remedy = f"{meant}See `{prog} --help`." if meant else f"Leave it out; see `{prog} --help`."
        raise UserError(f"Unexpected argument {unknown[0]!r}.", remedy)
    return parsed


def peek(options: type[T], argv: Sequence[str], *, prog: str) -> T:
    """Read first the few options that decide the defaults of the others, and ignore the rest; see `parse`.

    Args:
        options: Their dataclass, each with a default. The command has fields of the same names.

    Raises:
        UserError: A value is missing or does not fit.
    """
    own = [argument for argument in argv if not argument.startswith("--tyro-")]
    return _tyro(options, own, prog=prog, add_help=False)[0]


def _tyro(command: type[T], argv: Sequence[str], *, prog: str, **options: Any) -> tuple[T, list[str]]:
    """Call tyro, and turn the box in which it prints an error into a UserError."""
    import tyro

    errors = io.StringIO()
    # The box is read below; wide, it breaks no value. The help keeps the terminal's width.
    width = contextlib.nullcontext() if _HELP & set(argv) else _terminal_width(10_000)
    try:
        with width, contextlib.redirect_stderr(errors):
            return tyro.cli(command, args=argv, prog=prog, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_cause(errors.getvalue()), f"See `{prog} --help`.") from stop


def _cause(text: str) -> str:
    """Return the message of the box that tyro draws around an error, as one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    # Below the title; a rule or an empty row ends the message.
    rows = [row.strip("─-") and row for row in (line.strip(" │|╭╮╰╯+") for line in plain.splitlines()[1:])]
    message = itertools.takewhile(bool, itertools.dropwhile(lambda row: not row, rows))
    cause = " ".join(" ".join(message).split()) or "The command line is not understood"
    for pattern, wanted in (
        (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", "a whole number"),
        (r"Error parsing (\S+): could not convert string to float: (.*)", "a number"),
    ):
        cause = re.sub(pattern, rf"\1 takes {wanted}, not \2", cause)
    cause = cause[0].upper() + cause[1:]
    return cause if cause.endswith((".", "!")) else f"{cause}."


def _flags(command: Any, prefix: str = "", *, flat: bool = False) -> dict[str, Any]:
    """Return the type of every flag of a command's dataclass, the flags named as tyro names them."""
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(command, include_extras=True)
    for name in (field.name for field in dataclasses.fields(command)):
        annotated = typing.get_origin(hints[name]) is Annotated
        kind, *markers = typing.get_args(hints[name]) if annotated else [hints[name]]
        if dataclasses.is_dataclass(kind):
            omitted = flat or OmitArgPrefixes in markers
            flags |= _flags(kind, prefix if omitted else f"{prefix}{name}.", flat=omitted)
        elif Positional not in markers:
            flags[f"--{prefix}{name}".replace("_", "-")] = kind
            flags |= dict.fromkeys(
                (alias for marker in markers for alias in getattr(marker, "aliases", None) or ()), kind
            )
    return flags


def _negated(flag: str) -> str:
    """--no-flip for --flip."""
    section, dot, name = flag[2:].rpartition(".")
    return f"--{section}{dot}no-{name}"


def _with_values(argv: Sequence[str], undecided: Sequence[str]) -> list[str]:
    """Give flags of the type `bool | None` their value: --flip means --flip True, --no-flip means --flip False."""
    negated = {_negated(flag): flag for flag in undecided}
    found: list[str] = []
    for index, argument in enumerate(argv):
        name = argument.replace("_", "-")
        bare = name in undecided and not {*argv[index + 1 : index + 2]} & {"True", "False", "None"}
        if bare or name in negated:
            found += [negated.get(name, name), str(bare)]
        else:
            found.append(argument)
    return found


def _refuse_unknown_flag(argv: Sequence[str], flags: dict[str, Any], prog: str) -> None:
    known = [
        *flags,
        *(_negated(flag) for flag, kind in flags.items() if kind in (bool, bool | None)),
        "--debug",
    ]
    for argument in itertools.takewhile(lambda argument: argument != "--", argv):
        flag = argument.partition("=")[0]
        # --tyro-print-completion and its like are not flags of the command.
        if re.match(r"--?(?!-?tyro-)[a-zA-Z]", flag) and flag.replace("_", "-") not in known:
            near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError(f"Unknown option {flag}.", f"{hint}See `{prog} --help`.")


def run_main(
    main: Callable[[list[str]], None],
    argv: Sequence[str] | None = None,
    *,
    go_on: str = "run the same command again",
    shared: bool = False,
) -> int:
    """Run a command and turn its end into an exit code: `sys.exit(run_main(main))`.

    Args:
        main: The command, called with the command line; `--debug` is taken out.
        argv: What was typed after the program's name; by default this process's.
        go_on: What to do after an interruption that carries no note of its own.
        shared: Whether several processes of torchrun can share the command.

    Returns:
        0 done; 2 a mistake in what the user gave, told in a line of cause and one of remedy (with the
        traceback under `--debug`); 130 interrupted and 143 terminated, both resumable; 141 quietly where whoever
        read the output has gone, as in `... | head`; 1 anything else, with a traceback. A SystemExit passes through.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # The names of files need not be UTF-8; they are printed as they are.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        try:
            return _exit_code(main, list(sys.argv[1:] if argv is None else argv), go_on=go_on, shared=shared)
        finally:
            # Flushed here, because the interpreter's own flush at exit could only complain.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout):
            traceback.print_exc()
            return 1
        # What is still in the buffer has to go somewhere when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _exit_code(main: Callable[[list[str]], None], arguments: list[str], *, go_on: str, shared: bool) -> int:
    debug = "--debug" in arguments
    keep_freed_memory()
    try:
        with _sigterm_raises():
            if launched() > 1 and not shared:
                raise UserError(
                    f"torchrun has started {launched()} processes of a command that is one process's.",
                    "Start it with python instead of torchrun.",
                )
            main([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        return _told(error, debug=debug)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Whatever asks about a path may meet a folder without access; an error of a process or socket names no path.
        if error.errno in _PATH_ERRORS and error.filename is not None:
            cause = f"Cannot reach {os.fsdecode(error.filename)}: {error.strerror}."
            return _told(UserError(cause, "Check the path, and that you may read and write there."), debug=debug)
        # TensorBoard's thread and others also write, and do not know our errors.
        if error.errno not in _DISK_ERRORS:
            traceback.print_exc()
            return 1
        return _told(unwritable(Path(error.filename or "a file"), error), debug=debug)
    except KeyboardInterrupt as interrupt:
        if is_first():
            print(f"interrupted; {'; '.join(getattr(interrupt, '__notes__', [])) or go_on}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except Exception as error:  # want of memory is told; a defect of ours keeps its traceback
        if _is_want_of_memory(error):
            remedy = "Lower --batch-size, --channels, --drawn-members or --image-size, or --workers."
            return _told(UserError(f"Memory ran out: {str(error) or 'no more of it'}.", remedy), debug=debug)
        traceback.print_exc()
        return 1
    return 0


def _is_want_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of Python, of a GPU or of PyTorch on a CPU, which says so in a RuntimeError."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _told(error: UserError, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # The processes of torchrun may all find the same mistake.
    if is_first() if error.told is None else not error.told:
        for word, line in (("error", error.cause), ("remedy", error.remedy)):
            print(f"{word}: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe or socket that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise Terminated on SIGTERM, so that files and locks are closed as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: types.FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _terminal_width(columns: int) -> Iterator[None]:
    """Make tyro write for a terminal of this width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
