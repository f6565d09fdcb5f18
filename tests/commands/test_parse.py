from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated

import pytest
import sample_config
import tyro
from sample_config import Bilevel

from dnas_ens.commands import parse as cli
from dnas_ens.commands.parse import parse, pop_option, run_main
from dnas_ens.config import SearchConfig
from dnas_ens.errors import UserError

ROOT = Path(cli.__file__).parents[2]
PROG = "python -m dnas_ens.search"


@dataclass(frozen=True, kw_only=True)
class Late:
    epochs: int = 30
    """Epochs at the end."""


@dataclass(frozen=True, kw_only=True)
class Search(sample_config.Search):
    late: Late = field(default_factory=Late)


@dataclass(frozen=True, kw_only=True)
class Retrain:
    run_dir: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    epochs: int = 3
    """Epochs."""


def parse_search(*argv: str, default: Search | None = None, extra: Sequence[str] = ()) -> Search:
    default = Search() if default is None else default
    return parse(Search, argv, prog=PROG, description="Search.", default=default, extra_options=extra)


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in caught.value.cause + caught.value.remedy
    return caught.value.cause, caught.value.remedy


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_importing_does_not_import_torch() -> None:
    script = "import sys, tyro, dnas_ens.commands.parse, dnas_ens.commands.options; sys.exit('torch' in sys.modules)"
    assert run_python(script).returncode == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--epochs 7", Search(bilevel=Bilevel(epochs=7))),
        ("--epochs=7 --seed=3", Search(seed=3, bilevel=Bilevel(epochs=7))),
        ("--late.epochs 8 --epochs 7", Search(bilevel=Bilevel(epochs=7), late=Late(epochs=8))),
        ("--batch-size 5", Search(batch_size=5)),
        ("--batch_size 5", Search(batch_size=5)),
        ("--batch_size=5", Search(batch_size=5)),
        ("--second-order", Search(bilevel=Bilevel(second_order=True))),
        ("--temperature 2 0.5", Search(bilevel=Bilevel(temperature=(2.0, 0.5)))),
        ("--data-root a/b --limit 3", Search(data_root=Path("a/b"), limit=3)),
        ("--seed -3", Search(seed=-3)),
        ("--operations a b", Search(operations=("a", "b"))),
        ("", Search()),
    ],
)
def test_flags_are_read_as_tyro_reads_them(argv: str, expected: Search) -> None:
    assert parse_search(*argv.split()) == expected


def test_what_is_not_given_comes_from_the_default() -> None:
    default = Search(seed=9, bilevel=Bilevel(epochs=8, learning_rate=0.5))
    assert parse_search("--epochs", "2", default=default) == Search(
        seed=9, bilevel=Bilevel(epochs=2, learning_rate=0.5)
    )


def test_help_is_tyros_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_search("--help", "--epoch", "3")
    assert caught.value.code in (0, None)
    printed = capsys.readouterr().out
    assert PROG in printed
    assert "--epochs INT" in printed
    assert "Epochs over the weight half." in printed


def test_shells_can_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_search("--tyro-print-completion", "bash")
    assert caught.value.code in (0, None)
    assert "--learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "option", "meant"),
    [
        ("--epoch 5", "--epoch", "--epochs"),
        ("--epoch=5", "--epoch", "--epochs"),
        ("--seed 3 --batchsize 5", "--batchsize", "--batch-size"),
        ("--learning_rat=5", "--learning_rat", "--learning-rate"),
        ("--no-second-orde", "--no-second-orde", "--no-second-order"),
        ("--preste smoke", "--preste", "--preset"),
        ("--late.epoch 5", "--late.epoch", "--late.epochs"),
        ("--seed x --epoch 5", "--epoch", "--epochs"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(
    argv: str, option: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cause, remedy = refused(lambda: parse_search(*argv.split(), extra=("--preset",)))
    assert cause == f"Unknown option {option}."
    assert remedy == f"Did you mean {meant}? See `{PROG} --help`."
    assert capsys.readouterr() == ("", "")


def test_a_flag_like_none_is_refused_without_a_guess() -> None:
    assert refused(lambda: parse_search("--xyzzy")) == ("Unknown option --xyzzy.", f"See `{PROG} --help`.")


@pytest.mark.parametrize(
    ("argv", "flip"),
    [
        ("", None),
        ("--flip", True),
        ("--no-flip", False),
        ("--no_flip --seed 3", False),
        ("--flip --seed 3", True),
        ("--flip False", False),
        ("--flip=True", True),
    ],
)
def test_a_flag_that_may_be_left_undecided(argv: str, flip: bool | None) -> None:
    @dataclass(frozen=True)
    class Command:
        flip: bool | None = None
        """Mirror."""
        seed: int = 0
        """Seed."""

    assert parse(Command, argv.split(), prog=PROG, description="").flip is flip


def test_data_typed_without_its_flag_is_understood() -> None:
    @dataclass(frozen=True)
    class Command:
        data: str = "digits"
        """Which images."""

    cause, remedy = refused(lambda: parse(Command, ["my photos"], prog=PROG, description=""))
    assert cause == "Unexpected argument 'my photos'."
    assert "--data 'my photos'" in remedy


@pytest.mark.parametrize(
    ("argv", "cause", "in_remedy"),
    [
        ("--epochs abc", "--epochs takes a whole number, not 'abc'.", "Epochs over the weight half."),
        (
            "--learning-rate abc",
            "--learning-rate takes a number, not 'abc'.",
            "Learning rate of the weights.",
        ),
        ("--late.epochs abc", "--late.epochs takes a whole number, not 'abc'.", "Epochs at the end."),
        ("7", "Unexpected argument '7'.", "Leave it out"),
        ("--epochs 5 7", "Unexpected argument '7'.", "Leave it out"),
        ("--epochs 0", "--epochs is 0.", "Give --epochs 1 or more."),
    ],
)
def test_other_mistakes_are_a_line_of_cause_and_one_of_remedy(
    argv: str, cause: str, in_remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said, remedy = refused(lambda: parse_search(*argv.split()))
    assert said == cause
    assert in_remedy in remedy
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "flag", "in_remedy"),
    [("--epochs", "--epochs", "Epochs over"), ("--temperature 1", "--temperature", "First and last")],
)
def test_a_flag_without_its_value_is_named(argv: str, flag: str, in_remedy: str) -> None:
    cause, remedy = refused(lambda: parse_search(*argv.split()))
    assert cause.startswith("Missing value for argument")
    assert flag in cause
    assert in_remedy in remedy


def test_a_choice_that_does_not_exist_lists_those_that_do() -> None:
    cause, remedy = refused(lambda: parse_search("--penalty", "jss"))
    assert "'jss'" in cause
    assert "--penalty" in cause
    assert "('js', 'none')" in cause
    assert "Which penalty." in remedy
    assert f"`{PROG} --help`" in remedy


def test_help_that_goes_on_with_another_flags_name_stays_with_its_own() -> None:
    _, remedy = refused(lambda: parse_search("--limit", "x"))
    assert remedy.startswith("--limit {None}|INT ")
    assert f"{7 * '--batch-size '}is it. (default: None)" in remedy
    assert refused(lambda: parse_search("--batch-size", "x"))[1].startswith(
        "--batch-size INT Images of a step. (default: 64)."
    )


def test_every_flag_of_a_long_help_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a wide terminal tyro sets a help this long in columns.
    monkeypatch.setenv("COLUMNS", "300")
    default = SearchConfig()
    sections = [getattr(default, section.name) for section in fields(default)]
    names = [name.name for section in sections if is_dataclass(section) for name in fields(section)]
    assert len(names) > 40
    for name in names:
        flag = "--" + name.replace("_", "-")
        cause, remedy = refused(
            lambda flag=flag: parse(
                SearchConfig, [f"{flag}q", "1"], prog=PROG, description="", default=default
            )
        )
        assert cause == f"Unknown option {flag}q."
        assert remedy == f"Did you mean {flag}? See `{PROG} --help`."


def test_long_values_are_not_broken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    word = "a" * 150
    cause, _ = refused(lambda: parse_search("--epochs", word))
    assert word in cause
    assert os.environ["COLUMNS"] == "40"


def test_positional_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    def parse_retrain(*argv: str) -> Retrain:
        return parse(Retrain, argv, prog="retrain", description="Retrain.")

    assert parse_retrain("R", "--epochs", "4") == Retrain(run_dir=Path("R"), epochs=4)
    cause, remedy = refused(parse_retrain)
    assert "Missing from retrain" in cause
    assert remedy == "See `retrain --help`."
    for argv in ("--epoch=5", "--epoch 5", "R --epoch 5", "--epoch 5 R"):
        assert refused(lambda argv=argv: parse_retrain(*argv.split())) == (
            "Unknown option --epoch.",
            "Did you mean --epochs? See `retrain --help`.",
        )
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "value", "rest"),
    [
        ("--preset fast --seed 3", "fast", "--seed 3"),
        ("--seed 3 --preset=fast", "fast", "--seed 3"),
        ("--preset smoke --preset=fast x", "fast", "x"),
        ("--seed 3", "smoke", "--seed 3"),
        ("--presets fast", "smoke", "--presets fast"),
    ],
)
def test_one_option_is_read_ahead(argv: str, value: str, rest: str) -> None:
    assert pop_option(argv.split(), "--preset", "smoke") == (value, rest.split())


def test_option_read_ahead_has_a_default_of_any_type_and_accepts_underscores() -> None:
    assert pop_option([], "--config", None) == (None, [])
    assert pop_option(["--run_dir", "x"], "--run-dir", None) == ("x", [])
    assert pop_option(["--run-dir=--x"], "--run-dir", None) == ("--x", [])


@pytest.mark.parametrize("argv", ["--preset", "--preset=", "--preset --seed 3"])
def test_option_read_ahead_needs_its_value(argv: str) -> None:
    cause, remedy = refused(lambda: pop_option(argv.split(), "--preset", "a", choices=("fast", "paper")))
    assert cause == "--preset needs a value."
    assert "--preset fast" in remedy


def test_option_read_ahead_names_the_nearest_choice() -> None:
    cause, remedy = refused(
        lambda: pop_option(["--preset", "papr"], "--preset", "a", choices=("fast", "paper"))
    )
    assert cause == "--preset papr does not exist."
    assert remedy == "Did you mean paper? There are fast, paper."
    _, remedy = refused(lambda: pop_option(["--preset", "xyz"], "--preset", "a", choices=("fast", "paper")))
    assert remedy == "There are fast, paper."


MAIN = """
import os, signal, sys, time
from dnas_ens.commands.parse import run_main
from dnas_ens.errors import UserError

def main(argv):
    if argv[0] != "wait":
        print("argv", *argv, flush=True)
    if argv[0] == "mistake":
        raise UserError("The cause\\nis this.", "Do that.")
    if argv[0] == "bug":
        raise ZeroDivisionError("a bug")
    if argv[0] == "exit":
        sys.exit(int(argv[1]))
    if argv[0] == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(300)
        finally:
            print("cleaned up", flush=True)

sys.exit(run_main(main))
"""


@pytest.mark.parametrize(
    ("argv", "code", "stderr"),
    [
        ("fine", 0, ""),
        ("mistake", 2, "error: The cause is this.\nremedy: Do that.\n"),
        ("exit 0", 0, ""),
        ("exit 7", 7, ""),
    ],
)
def test_exit_codes(argv: str, code: int, stderr: str) -> None:
    done = run_python(MAIN, *argv.split())
    assert (done.returncode, done.stderr) == (code, stderr)
    assert done.stdout == f"argv {argv}\n"


def test_a_bug_shows_its_traceback_and_ends_with_1() -> None:
    done = run_python(MAIN, "bug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


def test_debug_shows_the_traceback_of_a_mistake_and_is_not_passed_on() -> None:
    done = run_python(MAIN, "mistake", "--debug", "x")
    assert done.returncode == 2
    assert done.stdout == "argv mistake x\n"
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("error: The cause is this.\nremedy: Do that.\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_cleans_up_and_says_how_to_go_on(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "wait"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (code, "cleaned up\n")
    assert stderr == "interrupted; run the same command again\n"


def test_a_mistyped_flag_ends_with_2_and_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert run_main(lambda argv: print(parse_search(*argv)), ["--epoch", "5"]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: Unknown option --epoch.\nremedy: Did you mean --epochs? See `{PROG} --help`.\n",
    )
    assert signal.getsignal(signal.SIGTERM) is handler


def end_of_a_command_nobody_reads(*arguments: str) -> tuple[int, str]:
    """Run python with a standard output whose reader has gone before it began."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["dnas_ens", "dnas_ens.search", "dnas_ens.retrain", "dnas_ens.evaluate"])
def test_help_that_nobody_reads_to_its_end_ends_quietly(command: str) -> None:
    assert end_of_a_command_nobody_reads("-m", command, "--help") == (128 + signal.SIGPIPE, "")


LATE = """
import sys
from dnas_ens.commands.parse import run_main

def main(argv):
    print("still in the buffer")
    if argv:
        sys.exit(int(argv[0]))

sys.exit(run_main(main))
"""


@pytest.mark.parametrize("argv", [[], ["0"]])
def test_a_pipe_that_breaks_at_the_end_is_quiet_too(argv: list[str]) -> None:
    assert end_of_a_command_nobody_reads("-c", LATE, *argv) == (128 + signal.SIGPIPE, "")
    assert run_python(LATE, *argv).returncode == 0


def test_another_pipe_that_breaks_is_a_bug() -> None:
    script = "import sys\nfrom dnas_ens.commands.parse import run_main\ndef main(argv):\n    raise BrokenPipeError\n"
    done = run_python(script + "sys.exit(run_main(main))")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
