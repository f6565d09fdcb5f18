"""Scalars and figures of long work: metrics.jsonl for programs, TensorBoard for people."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dnas_ens.run.files import unreadable, write_atomic, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Scalars in metrics.jsonl, one JSON line a call, and the same scalars in TensorBoard.

    A phase is one course of steps, such as `search` or `member-3`. Each has a TensorBoard folder of its own,
    because resuming hides all events of a folder past a step.

    Args:
        folder: The folder of metrics.jsonl.
        tensorboard: Folder of the phases' TensorBoard folders; `folder/tensorboard` by default.
    """

    def __init__(self, folder: Path, *, tensorboard: Path | None = None) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.tensorboard = Path(folder) / "tensorboard" if tensorboard is None else Path(tensorboard)
        self._file: TextIO | None = None
        self._writers: dict[str, SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}

    def log(self, scalars: Mapping[str, float], *, step: int, phase: str, epoch: int | None = None) -> None:
        """Append one line, and `<phase>/<name>` to TensorBoard; both have left the process on return.

        JSON has no NaN or infinity: in metrics.jsonl these read null.
        """
        line: dict[str, Any] = {"time": round(time.time(), 3), "phase": phase, "step": step, "epoch": epoch}
        if taken := line.keys() & scalars.keys():
            raise ValueError(f"scalars cannot be called {sorted(taken)}")
        values = {name: value if isinstance(value, int) else float(value) for name, value in scalars.items()}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self.path):
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            writer = self._writer(phase)
            for name, value in values.items():
                writer.add_scalar(f"{phase}/{name}", value, step)
            writer.flush()

    def read(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl as dictionaries, of one phase or of all.

        A damaged line is skipped and reported: no result depends on it.

        Raises:
            UserError: The file cannot be read, or a line is JSON of another form.
        """
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise unreadable(self.path, error) from error
        lines = []
        for number, text in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
            except ValueError as error:
                print(f"{self.path}: line {number} is passed over ({error})", file=sys.stderr, flush=True)
                continue
            if not isinstance(line, dict) or not {"phase", "step"} <= line.keys():
                raise unreadable(self.path, f"line {number} is not of this log")
            lines.append(line)
        return [line for line in lines if phase in (None, line["phase"])]

    def truncate(self, phase: str, *, step: int) -> None:
        """Drop what a phase logged after a step, in both places, so that resuming leaves no line twice."""
        self.close()
        lines = self.read()
        kept = [line for line in lines if line["phase"] != phase or line["step"] <= step]
        if len(kept) < len(lines):
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._purge_steps[phase] = step + 1

    def add_figure(self, tag: str, figure: Figure, *, step: int, phase: str) -> None:
        """Add a matplotlib figure to TensorBoard as the image `<phase>/<tag>`; it needs no display."""
        writer = self._writer(phase)
        writer.add_figure(f"{phase}/{tag}", figure, step)
        writer.flush()

    def add_hparams(self, config: Mapping[str, Any], *, phase: str, metrics: Sequence[str]) -> None:
        """Show a configuration in TensorBoard's HPARAMS tab beside the scalars `metrics` that the phase logs."""
        from torch.utils.tensorboard.summary import hparams

        summaries = hparams(_flat(config, ""), {f"{phase}/{name}": 0.0 for name in metrics})
        writer = self._writer(phase)
        events: Any = writer.file_writer  # None, say its type hints
        for summary in summaries:
            events.add_summary(summary)
        writer.flush()

    def close(self) -> None:
        """Close the files; a later call opens them again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        while self._writers:
            self._writers.popitem()[1].close()

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            file.seek(0)
            content = file.read()
            # A killed process may have left half a line, which would spoil the next one.
            file.truncate(content.rfind(b"\n") + 1)
        return open(self.path, "a", buffering=1, encoding="utf-8")

    def _writer(self, phase: str) -> SummaryWriter:
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = self._purge_steps.pop(phase, None)
            # Closing waits for the writer's thread, which sleeps for as long where an interruption kept it from
            # being woken: by default two minutes, longer than a scheduler waits.
            self._writers[phase] = SummaryWriter(str(self.tensorboard / phase), purge_step=purge_step, flush_secs=2)
        return self._writers[phase]


def _flat(config: Mapping[str, Any], prefix: str) -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            # A path need not be UTF-8, and TensorBoard takes nothing else.
            text = str(value).encode(errors="backslashreplace").decode()
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float) else text
    return flat
