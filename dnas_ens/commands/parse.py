"""The command line: flags from dataclasses (tyro), exit codes, and errors of one line each.

Importing this module does not import torch, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from dnas_ens.errors import UserError
from dnas_ens.run.allocator import keep_freed_memory
from dnas_ens.run.files import unwritable

T = TypeVar("T")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# Fields of a nested dataclass that is not flat have dots in their flags.
_FLAG = re.compile(r"--\w[\w-]*(?:\.\w[\w-]*)*")
# What a shell reports for a program that SIGPIPE has ended.
_BROKEN_PIPE = 128 + signal.SIGPIPE
#: A disk that is full or read-only: a matter of the user's machine.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_BOX = " \t│|╭╮╰╯+"


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C but for its exit code."""


def parse(
    command: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    extra_options: Sequence[str] = (),
) -> T:
    """Read a command's options into its dataclass.

    Args:
        command: The dataclass; each field is a flag, its docstring the help. The fields of a nested one are
            `--section.field`, or flat where it is marked `tyro.conf.OmitArgPrefixes`.
        argv: What was typed after the program's name.
        prog: The program's name as typed, such as `python -m dnas_ens.search`.
        description: First lines of `--help`.
        default: Values of the fields that are not given; None where fields have defaults of their own.
        extra_options: Flags read elsewhere (`pop_option`), to be suggested for a mistyped one.

    Returns:
        The dataclass with what was given.

    Raises:
        UserError: A flag is unknown (the nearest is named) or a value does not fit.
        SystemExit: With 0, after `--help` was printed.
    """
    import tyro

    def call(arguments: Sequence[str]) -> tuple[T, list[str]]:
        options: dict[str, Any] = {} if default is None else {"default": default}
        return tyro.cli(
            command,
            args=arguments,
            prog=prog,
            description=description,
            return_unknown_args=True,
            **options,
        )

    if {"-h", "--help"} & set(argv):
        call(argv)
    # Before parsing, for a mistyped flag may otherwise be read as the value of a positional argument.
    rows = _help_rows(call)
    undecided = [flag for flag, row in rows.items() if "{None,True,False}" in row.split(" (default")[0]]
    negated = [_negated(flag) for flag in undecided]
    _refuse_unknown_flag(argv, [*rows, *negated, *extra_options, "--debug"], prog)
    argv = _with_values(argv, undecided)
    errors = io.StringIO()
    try:
        with _terminal_width(10_000), contextlib.redirect_stderr(errors):
            parsed, unknown = call(argv)
    except SystemExit as stop:
        if not stop.code:
            raise
        cause = _cause(errors.getvalue())
        row = next((f"{rows[flag]}. " for flag in _FLAG.findall(cause) if flag in rows), "")
        raise UserError(cause, f"{row}See `{prog} --help`.") from stop
    if unknown:
        meant = f"If it is the data, type --data {shlex.quote(unknown[0])}. " if "--data" in rows else ""
        remedy = f"{meant}See `{prog} --help`." if meant else f"Leave it out; see `{prog} --help`."
        raise UserError(f"Unexpected argument {unknown[0]!r}.", remedy)
    return parsed


def pop_option(
    argv: Sequence[str], option: str, default: T, *, choices: Sequence[str] = ()
) -> tuple[str | T, list[str]]:
    """Take one option out of a command line before the rest is parsed.

    Args:
        argv: What was typed.
        option: The flag, such as `--preset`; both `--preset x` and `--preset=x` are read, the last counts.
        default: Its value where it is not given.
        choices: The values allowed; empty allows any.

    Returns:
        The value, and argv without the option.

    Raises:
        UserError: The value is missing or not among the choices.
    """
    value: str | T = default
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, given = argument.partition("=")
        if name.replace("_", "-") != option:
            rest.append(argument)
            continue
        value = given if equals else next(arguments, "")
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"{option} needs a value.", f"Give one, such as {option} {_example(choices)}.")
        if choices and value not in choices:
            raise UserError(f"{option} {value} does not exist.", _nearest(value, choices))
    return value, rest


def run_main(
    main: Callable[[list[str]], None],
    argv: Sequence[str] | None = None,
    *,
    go_on: str = "run the same command again",
) -> int:
    """Run a command and turn its end into an exit code: `sys.exit(run_main(main))`.

    Args:
        main: The command, called with the command line; `--debug` is taken out.
        argv: What was typed after the program's name; by default this process's.
        go_on: What to do after an interruption, printed with it where the interruption carries no note of its own.

    Returns:
        0 done; 2 a mistake in what the user gave, told in a line of cause and one of remedy (with the
        traceback under `--debug`); 130 interrupted and 143 terminated, both resumable; 141 quietly where whoever
        read the output has gone, as in `... | head`; 1 anything else, with a traceback. A SystemExit passes through.
    """
    try:
        try:
            return _exit_code(main, list(sys.argv[1:] if argv is None else argv), go_on=go_on)
        finally:
            # Here, for where the interpreter's own flush at its end fails, it can only complain.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout):
            traceback.print_exc()
            return 1
        # What is still in the buffer has to go somewhere when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _exit_code(main: Callable[[list[str]], None], arguments: list[str], *, go_on: str) -> int:
    debug = "--debug" in arguments
    keep_freed_memory()
    try:
        with _sigterm_raises():
            main([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        return _told(error, debug=debug)
    except BrokenPipeError:
        raise
    except OSError as error:
        # TensorBoard's thread and others write, too, and do not know our errors.
        if error.errno not in _DISK_ERRORS:
            traceback.print_exc()
            return 1
        return _told(unwritable(Path(error.filename or "a file"), error), debug=debug)
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", [])
        print(f"interrupted; {notes[0] if notes else go_on}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except Exception:  # a defect of ours, not a mistake of the user's: it keeps its traceback
        traceback.print_exc()
        return 1
    return 0


def _told(error: UserError, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
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
    """Let SIGTERM unwind the stack as Ctrl-C does, so that files and locks are closed."""
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
    """Let tyro write what is read back here as if to a terminal of this width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _help_rows(call: Callable[[Sequence[str]], object]) -> dict[str, str]:
    """Every flag of a command with its row of the help, read from the help itself: tyro's public face."""
    text = io.StringIO()
    # Wider, and tyro would set the help in several columns.
    with _terminal_width(100), contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        call(["--help"])
    rows: dict[str, str] = {}
    current: list[str] = []
    for line in _ANSI.sub("", text.getvalue()).splitlines():
        row = " ".join(line.strip(_BOX).split())
        if re.match(r"\W {8}", line):
            # The help beside or below a flag goes on; it may itself begin with the name of another flag.
            rows |= {flag: f"{rows[flag]} {row}".rstrip() for flag in current}
        elif row.startswith("-") and not _is_rule(row):
            current = _FLAG.findall(re.split(r" (?!--?[a-zA-Z])", row)[0])
            rows |= dict.fromkeys(current, row)
    return rows


def _negated(flag: str) -> str:
    """--no-flip for --flip."""
    return f"--no-{flag[2:]}"


def _with_values(argv: Sequence[str], undecided: Sequence[str]) -> list[str]:
    """Let flags that may be left undecided be typed as others are: --flip for --flip True, --no-flip for False."""
    negated = {_negated(flag): flag for flag in undecided}
    found: list[str] = []
    for index, argument in enumerate(argv):
        name = argument.replace("_", "-")
        bare = name in undecided and argv[index + 1 : index + 2] not in (["True"], ["False"], ["None"])
        if bare or name in negated:
            found += [negated.get(name, name), str(bare)]
        else:
            found.append(argument)
    return found


def _refuse_unknown_flag(arguments: Sequence[str], known: Sequence[str], prog: str) -> None:
    for argument in arguments:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        # --tyro-print-completion and its like are no part of the help.
        if re.match(r"--?(?!-?tyro-)[a-zA-Z]", flag) and flag.replace("_", "-") not in known:
            raise UserError(f"Unknown option {flag}.", f"{_suggestion(flag, known)}See `{prog} --help`.")


def _cause(text: str) -> str:
    """The message of the box that tyro draws around an error, as one line."""
    rows = [row for line in _ANSI.sub("", text).splitlines() if (row := line.strip(_BOX))]
    # The first row is the title, with a rule below it where the box has no frame; a rule ends the message.
    body = itertools.dropwhile(_is_rule, rows[1:])
    cause = " ".join(" ".join(itertools.takewhile(lambda row: not _is_rule(row), body)).split())
    cause = cause or "The command line is not understood"
    for pattern, wanted in (
        (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", "a whole number"),
        (r"Error parsing (\S+): could not convert string to float: (.*)", "a number"),
    ):
        if match := re.fullmatch(pattern, cause):
            cause = f"{match[1]} takes {wanted}, not {match[2]}"
    cause = cause[0].upper() + cause[1:]
    return cause if cause.endswith((".", "!")) else f"{cause}."


def _is_rule(row: str) -> bool:
    return set(row) <= set("─-")


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def _nearest(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    return "".join(f"Did you mean {name}? " for name in near) + f"There are {', '.join(choices)}."


def _example(choices: Sequence[str]) -> str:
    return choices[0] if choices else "VALUE"
