"""Processes of Python that tests start and interrupt."""

import signal
import subprocess
import sys


def start(*arguments, **options):
    """Start Python with Ctrl-C as at a terminal: a shell starts background jobs with it ignored, as children are."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
