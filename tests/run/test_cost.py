import time

import pytest

from dnas_ens.run.progress import CostMeter


def test_waiting_costs_wall_time_and_working_costs_both():
    waiting = CostMeter()
    time.sleep(0.2)
    waited = waiting.seconds()
    assert waited["wall_seconds"] >= 0.2
    assert waited["cpu_seconds"] < 0.2
    working = CostMeter()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    worked = working.seconds()
    assert worked["cpu_seconds"] >= 0.1
    assert worked["wall_seconds"] >= 0.09


def test_earlier_sittings_count():
    meter = CostMeter({"wall_seconds": 100.0, "cpu_seconds": 50.0})
    assert 100.0 <= meter.seconds()["wall_seconds"] < 101.0
    assert 50.0 <= meter.seconds()["cpu_seconds"] < 51.0


def test_gpu_seconds_are_the_wall_seconds_a_gpu_was_held():
    assert "gpu_seconds" not in CostMeter().seconds()
    meter = CostMeter({"wall_seconds": 100.0, "cpu_seconds": 50.0, "gpu_seconds": 30.0}, gpu=True)
    spent = meter.seconds()
    assert spent["gpu_seconds"] - 30.0 == pytest.approx(spent["wall_seconds"] - 100.0)
    # What an earlier sitting held stays, also where this one holds none.
    assert CostMeter({"gpu_seconds": 30.0}).seconds()["gpu_seconds"] == 30.0


def test_a_paused_meter_rests():
    meter = CostMeter({"cpu_seconds": 5.0})
    meter.pause()
    before = meter.seconds()
    sum(range(10**6))
    assert meter.seconds() == before
    meter.resume()
    sum(range(10**6))
    assert meter.seconds()["cpu_seconds"] > before["cpu_seconds"] >= 5.0
