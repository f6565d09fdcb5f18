import io
import math
import os
import re
import termios
import time

import numpy as np
import pytest

from dnas_ens.run.progress import CostMeter, Progress


def test_time_left_is_the_mean_epoch_times_the_epochs_left():
    clock = iter([100.0, 130.0, 190.0, 100.0 + 2 * 3725.0])
    stream = io.StringIO()
    progress = Progress(62, description="x", steps_per_epoch=1, initial_epoch=2, stream=stream, clock=clock.__next__)
    for epoch in (3, 4):
        progress.step(loss=0.5)
        progress.count_images(600)
        progress.epoch(epoch, loss=0.5)
    progress.epoch(4)
    # 600 images in 30 s, then in 60 s; 59 epochs of 30 s are left, then 58 of 45 s, then 58 of 3725 s.
    assert stream.getvalue().splitlines() == [
        "x 3/62  loss 0.5000  images/s 20  eta 29:30",
        "x 4/62  loss 0.5000  images/s 10  eta 43:30",
        "x 4/62  eta 60:00:50",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        (None, "None"),
        (0.0, "0.0000"),
        (12.3456, "12.346"),
        (812.44, "812.4"),
        (12345.6, "12346"),
        (1.5e-5, "1.50e-05"),
        (math.nan, "nan"),
        (np.float32(0.25), "0.2500"),
    ],
)
def test_values_read_well(value, shown):
    stream = io.StringIO()
    Progress(1, description="x", steps_per_epoch=1, stream=stream).epoch(0, value=value)
    assert stream.getvalue() == f"x 0/1  value {shown}\n"


def test_a_terminal_gets_a_bar_and_the_same_line():
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with os.fdopen(slave, "w") as terminal:
        with Progress(2, description="search", steps_per_epoch=5, stream=terminal) as progress:
            for _ in range(2):
                # The bar is drawn ten times a second.
                time.sleep(0.11)
                progress.step(loss=0.5)
            progress.epoch(1, loss=0.5)
        terminal.flush()
        written = ""
        while "eta" not in written:
            written += os.read(master, 65536).decode()
    os.close(master)
    assert "2/10" in written
    assert "loss=0.5000" in written
    assert re.search(r"search 1/2  loss 0\.5000  eta \d+:\d\d\r\n", written)


def test_waiting_costs_wall_time_and_working_costs_both():
    waiting = CostMeter()
    time.sleep(0.1)
    waited = waiting.seconds()
    assert waited["wall_seconds"] >= 0.1 > waited["cpu_seconds"]
    working = CostMeter({"cpu_seconds": 5.0})
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    working.pause()
    worked = working.seconds()
    assert worked["cpu_seconds"] >= 5.1
    assert worked["wall_seconds"] >= 0.09
    sum(range(10**6))
    assert working.seconds() == worked
    working.resume()
    sum(range(10**6))
    assert working.seconds()["cpu_seconds"] > worked["cpu_seconds"]


def test_gpu_seconds_are_the_wall_seconds_a_gpu_was_held():
    assert "gpu_seconds" not in CostMeter().seconds()
    meter = CostMeter({"wall_seconds": 100.0, "cpu_seconds": 50.0, "gpu_seconds": 30.0}, gpu=True)
    spent = meter.seconds()
    assert spent["gpu_seconds"] - 30.0 == pytest.approx(spent["wall_seconds"] - 100.0)
    # What an earlier start held stays, also where this one holds none.
    assert CostMeter({"gpu_seconds": 30.0}).seconds()["gpu_seconds"] == 30.0
