"""Flags and exit codes: what is understood, and what is told of a mistake."""

from __future__ import annotations

import errno
import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sample_config
import tyro
from processes import start
from sample_config import Bilevel

from dnas_ens.commands import evaluate, whole_way
from dnas_ens.commands.parse import _flags, _negated, parse, peek, run_main
from dnas_ens.errors import UserError

PROG = "python -m dnas_ens.search"
SEE = f"See `{PROG} --help`."


@dataclass(frozen=True, kw_only=True)
class Late:
    epochs: int = 30
    """Epochs at the end."""


@dataclass(frozen=True, kw_only=True)
class Search(sample_config.Search):
    late: Late = field(default_factory=Late)
    flip: bool | None = None
    """Mirror."""


@dataclass(frozen=True, kw_only=True)
class Retrain:
    run_dir: tyro.conf.Positional[Path]
    """The run folder."""
    epochs: int = 3
    """Epochs."""
    data: str = "digits"
    """Which images."""


def parse_search(*argv, default=None):
    return parse(Search, argv, prog=PROG, description="Search.", default=default or Search())


def parse_retrain(*argv):
    return parse(Retrain, argv, prog=PROG, description="Retrain.")


def refused(call, *argv):
    with pytest.raises(UserError) as caught:
        call(*argv)
    assert "\n" not in caught.value.cause + caught.value.remedy
    return caught.value.cause, caught.value.remedy


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", Search()),
        ("--epochs=7 --seed=-3", Search(seed=-3, bilevel=Bilevel(epochs=7))),
        ("--late.epochs 8 --epochs 7", Search(bilevel=Bilevel(epochs=7), late=Late(epochs=8))),
        ("--batch_size=5", Search(batch_size=5)),
        ("--second-order", Search(bilevel=Bilevel(second_order=True))),
        ("--temperature 2 0.5", Search(bilevel=Bilevel(temperature=(2.0, 0.5)))),
        ("--data-root a/b --limit 3", Search(data_root=Path("a/b"), limit=3)),
        ("--operations a b", Search(operations=("a", "b"))),
        ("--flip --seed 3", Search(flip=True, seed=3)),
        ("--no_flip", Search(flip=False)),
        ("--flip=False", Search(flip=False)),
    ],
)
def test_flags_that_are_understood(argv, expected):
    assert parse_search(*argv.split()) == expected


def test_what_is_not_given_comes_from_the_default():
    default = Search(seed=9, bilevel=Bilevel(epochs=8, learning_rate=0.5))
    expected = Search(seed=9, bilevel=Bilevel(epochs=2, learning_rate=0.5))
    assert parse_search("--epochs", "2", default=default) == expected
    assert parse_retrain("R", "--epochs", "4") == Retrain(run_dir=Path("R"), epochs=4)


@pytest.mark.parametrize(("argv", "told"), [("--help --epoch 3", PROG), ("--tyro-print-completion bash", "--epochs")])
def test_help_and_completion_are_tyros(argv, told, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_search(*argv.split())
    assert caught.value.code in (0, None)
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("command", [whole_way.WholeWayCommand, evaluate.EvaluateCommand])
def test_the_flags_known_are_those_of_the_help(command, capsys):
    with pytest.raises(SystemExit):
        parse(command, ["--help"], prog=PROG, description="")
    rows = re.findall(r"^\W{,3}(--\w[\w.-]*)(?:, (--\w[\w.-]*))?", capsys.readouterr().out, re.MULTILINE)
    told = {flag for row in rows for flag in row if flag}
    flags = _flags(command)
    known = {*flags, *(_negated(flag) for flag, kind in flags.items() if kind is bool)}
    assert told - {"--help"} == known


@pytest.mark.parametrize(
    ("argv", "cause", "remedy"),
    [
        ("--seed x --epoch=5", "Unknown option --epoch.", f"Did you mean --epochs? {SEE}"),
        ("--no-second-orde", "Unknown option --no-second-orde.", f"Did you mean --no-second-order? {SEE}"),
        ("--late.epoch 5", "Unknown option --late.epoch.", f"Did you mean --late.epochs? {SEE}"),
        ("--xyzzy", "Unknown option --xyzzy.", SEE),
        ("--learning-rate abc", "--learning-rate takes a number, not 'abc'.", SEE),
        (f"--late.epochs {'a' * 150}", f"--late.epochs takes a whole number, not '{'a' * 150}'.", SEE),
        ("--limit x", "Error parsing --limit: .* from \\['x'\\]\\.", SEE),
        ("--penalty jss", "Invalid choice 'jss' for argument '--penalty'.*\\('js', 'none'\\)\\.", SEE),
        ("--temperature 1", "Missing value for argument '--temperature'.*", SEE),
        ("--epochs 5 7", "Unexpected argument '7'.", f"Leave it out; see `{PROG} --help`."),
        ("--epochs 0", "--epochs is 0.", "Give --epochs 1 or more."),
    ],
)
def test_a_mistake_is_a_line_of_cause_and_one_of_remedy(argv, cause, remedy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    said = refused(parse_search, *argv.split())
    assert re.fullmatch(cause, said[0]), said[0]
    assert said[1] == remedy
    assert capsys.readouterr() == ("", "")


def test_a_mistyped_flag_is_no_positional_argument():
    for argv in ("--epoch=5", "R --epoch 5", "--epoch 5 R"):
        assert refused(parse_retrain, *argv.split())[0] == "Unknown option --epoch."
    assert "The run folder" in refused(parse_retrain)[0]
    cause, remedy = refused(parse_retrain, "R", "my photos")
    assert cause == "Unexpected argument 'my photos'."
    assert "--data 'my photos'" in remedy


def test_options_read_ahead():
    @dataclass
    class Early:
        preset: str = "smoke"
        run_dir: Path | None = None

    def read(argv):
        return peek(Early, argv.split(), prog=PROG)

    assert read("--seed 3 x --help --tyro-print-completion bash") == Early()
    assert read("--preset fast --temperature 1 -0.5 --preset=paper") == Early(preset="paper")
    assert read("--operations a b --run_dir x --no-flip") == Early(run_dir=Path("x"))
    assert "'--preset'" in refused(read, "--preset --seed 3")[0]


TOLD = "error: The cause is this.\nremedy: Do that.\n"


def ended(argv):
    print("argv", *argv)
    if "mistake" in argv:
        raise UserError("The cause\nis this.", "Do that.")
    if "bug" in argv:
        raise ZeroDivisionError("a bug")
    if "pipe" in argv:
        raise BrokenPipeError
    if "long" in argv:
        Path("a" * 1000).exists()
    if "process" in argv:
        raise PermissionError(errno.EPERM, "Operation not permitted")
    if "full" in argv:
        Path("/dev/full").write_text("x")


@pytest.mark.parametrize(
    ("argv", "code", "stderr"),
    [
        ("fine", 0, ""),
        ("mistake", 2, TOLD),
        ("mistake --debug", 2, rf"Traceback.*{TOLD}"),
        ("bug", 1, "Traceback.*ZeroDivisionError: a bug\n"),
        ("pipe", 1, "Traceback.*BrokenPipeError\n"),
        ("long", 2, "error: Cannot reach a{1000}: File name too long.\nremedy: Check the path, .*\n"),
        ("process", 1, "Traceback.*PermissionError.*\n"),
        ("full", 2, "error: Cannot write .*No space left on device.\nremedy: .*\n"),
    ],
)
def test_exit_codes(argv, code, stderr, capsys):
    if argv == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full to stand for a full disk")
    handler = signal.getsignal(signal.SIGTERM)
    assert run_main(ended, argv.split()) == code
    printed = capsys.readouterr()
    assert printed.out == f"argv {argv.removesuffix(' --debug')}\n"
    assert re.fullmatch(stderr, printed.err, re.DOTALL)
    assert signal.getsignal(signal.SIGTERM) is handler


COMMAND = """
import sys, time
from dnas_ens.commands.parse import run_main

def main(argv):
    try:
        print("printed", flush="wait" in argv)
        time.sleep(300 if "wait" in argv else 0)
    finally:
        print("cleaned up")
    if "exit" in argv:
        sys.exit(0)

sys.exit(run_main(main))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_cleans_up_and_says_how_to_go_on(number, code):
    with start("-c", COMMAND, "wait") as process:
        assert process.stdout.readline() == "printed\n"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (code, "cleaned up\n")
    assert stderr == "interrupted; run the same command again\n"


@pytest.mark.parametrize("arguments", [("-m", "dnas_ens", "--help"), ("-c", COMMAND, "exit")])
def test_output_that_nobody_reads_ends_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with start(*arguments, stdout=writing) as process:
        os.close(writing)
        assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("module", ["search", "evaluate"])
def test_help_needs_no_torch(module):
    package = f"dnas_ens.{module}"
    script = (
        f"import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('{package}', run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    with start("-c", script) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def want_of_python(_):
    bytearray(2**62)


def want_of_torch(_):
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def want_of_a_gpu(_):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("main", [want_of_python, want_of_torch, want_of_a_gpu])
def test_memory_that_runs_out_names_what_to_lower(main, capsys):
    assert run_main(main, []) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith("error: Memory ran out: ")
    assert remedy.startswith("remedy: Lower --batch-size")
    known = {re.sub(r".*\.", "--", flag) for flag in _flags(whole_way.WholeWayCommand)}
    assert set(re.findall(r"--[\w-]+", remedy)) <= known
