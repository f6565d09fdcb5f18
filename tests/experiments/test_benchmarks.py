import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


def benchmark(name, *arguments, code=0):
    process = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert process.returncode == code, process.stderr
    return process.stdout, process.stderr


def check_comparison(result, *, ours):
    """Everything that is derived agrees with the seconds and the bytes it comes from."""
    sides = result["sides"]
    for side in sides.values():
        seconds = side["seconds"]
        assert seconds["median"] == pytest.approx(statistics.median(seconds["values"]))
        assert 0 < seconds["lower_quartile"] <= seconds["median"] <= seconds["upper_quartile"]
    others = [name for name in sides if name != ours]
    assert list(result["time_ratios"]) == [f"{name} / {ours}" for name in others]
    for name in others:
        ratio = result["time_ratios"][f"{name} / {ours}"]
        assert ratio["ratio"] == sides[name]["seconds"]["median"] / sides[ours]["seconds"]["median"]
        assert 0 < ratio["lower_quartile"] <= ratio["upper_quartile"]
    for name, share in result["memory_ratios"].items():
        other, own = (sides[side]["peak_memory"] for side in (name.removeprefix(f"{ours} / "), ours))
        assert share is None or share == own["added_bytes"] / other["added_bytes"]
        assert own["added_bytes"] == own["peak_bytes"] - own["before_bytes"] >= 0


def check_line(stdout, output, *, name):
    """Standard output is one line of JSON, and the file ends in it."""
    (line,) = stdout.splitlines()
    assert output.read_text().splitlines()[-1] == line
    result = json.loads(line)
    assert result["benchmark"] == name
    env = result["environment"]
    assert env["command"][:2] == ["python", f"experiments/benchmarks/{name}.py"]
    assert {"time", "cpu", "num_cpus", "packages", "python", "git_revision", "cuda_device"} <= set(env)
    return result


def test_search_step(tmp_path):
    output = tmp_path / "new" / "lines.jsonl"
    tiny = ("--image-size", 4, "--channels", 2, "--batch-size", 4, "--members", 2, "--num-cells", 1)
    once = ("--rounds", 2, "--warmup", 0, "--memory-steps", 1, "--threads", 1, "--output", output)
    stdout, stderr = benchmark("search_step", "--setting", "28x28", *tiny, *once, "--one-graph")
    result = check_line(stdout, output, name="search_step")
    check_comparison(result, ours="ours")
    assert len(result["sides"]) == 3
    assert len(result["memory_ratios"]) == 2
    assert result["setting"] == "28x28"
    assert (result["options"]["channels"], result["options"]["keep_memory"], result["threads"]) == (
        2,
        True,
        1,
    )
    assert "textbook, same images / ours" in stderr


def test_mistakes_are_told(tmp_path):
    _, err = benchmark("search_step", "--members", 3, code=2)
    assert "3 members do not divide a batch of 64 images" in err
    _, err = benchmark("search_step", "--rounds", 0, code=2)
    assert "--rounds is 0" in err
    # Raised in the measuring process.
    _, err = benchmark("retraining", "--batches", 1000, "--output", tmp_path / "none", code=2)
    assert "training images of digits" in err
    assert not (tmp_path / "none").exists()


def test_retraining(tmp_path):
    output = tmp_path / "lines.jsonl"
    tiny = ("--channels", 2, "--batch-size", 8, "--batches", 2, "--workers", 1)
    once = ("--rounds", 2, "--warmup", 0, "--no-memory", "--no-keep-memory", "--output", output)
    stdout, stderr = benchmark("retraining", *tiny, *once)
    result = check_line(stdout, output, name="retraining")
    check_comparison(result, ours="ours")
    assert result["images_per_round"] == 16
    assert result["options"]["keep_memory"] is False
    assert result["memory_ratios"] == {}
    for side in result["sides"].values():
        speeds = [16 / seconds for seconds in side["seconds"]["values"]]
        assert side["images_per_second"]["median"] == pytest.approx(statistics.median(speeds))
    assert "images a second" in stderr


def test_startup_appends_to_what_is_there(tmp_path):
    output = tmp_path / "lines.jsonl"
    output.write_text("an earlier line\n")
    stdout, _ = benchmark("startup", "--rounds", 1, "--warmup", 0, "--output", output)
    result = check_line(stdout, output, name="startup")
    assert output.read_text() == "an earlier line\n" + stdout
    check_comparison(result, ours="search --help")
    assert result["sides"]["import torch"]["imports_torch"]
    assert not result["sides"]["search --help"]["imports_torch"]


@pytest.mark.parametrize(("what", "sides"), [("search", 2), ("retraining", 4)])
def test_execution(tmp_path, what, sides):
    output = tmp_path / "lines.jsonl"
    tiny = ("--channels", 2, "--batch-size", 8, "--batches", 1, "--num-cells", 1)
    once = ("--rounds", 1, "--warmup", 0, "--no-memory", "--device", "cpu", "--output", output)
    stdout, stderr = benchmark("execution", "--what", what, *tiny, *once)
    result = check_line(stdout, output, name="execution")
    check_comparison(result, ours="ours")
    assert len(result["sides"]) == sides
    assert "channels_last bfloat16 / ours" in stderr


def test_bytes_of_known_operations(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    moved_bytes = importlib.import_module("floor").moved_bytes
    values, other = torch.zeros(3, 5), torch.zeros(3, 5)

    def step():
        # A view and memory that is only reserved move nothing; a sum of two reads both and writes a third;
        # in place it writes one of the two.
        values.t()
        values + other
        values.add_(other)
        torch.empty_like(values)

    total, by_operation = moved_bytes(step)
    assert by_operation == {"add": 3 * 60, "add_": 2 * 60}
    assert total == 300


def test_floor(tmp_path):
    output = tmp_path / "lines.jsonl"
    tiny = ("--image-size", 4, "--channels", 2, "--batch-size", 4, "--members", 2, "--num-cells", 1)
    once = ("--rounds", 2, "--warmup", 0, "--no-memory", "--device", "cpu", "--output", output)
    stdout, _ = benchmark("floor", *tiny, *once, "--profile", tmp_path / "profile.txt")
    result = check_line(stdout, output, name="floor")
    check_comparison(result, ours="ours")
    assert result["bytes"] == sum(result["by_operation"].values()) > 0
    assert "convolution" in (tmp_path / "profile.txt").read_text()


def test_side_by_side(tmp_path):
    output = tmp_path / "lines.jsonl"
    tiny = ("--members", 2, "--channels", 2, "--batch-size", 512, "--batches", 3)
    once = ("--rounds", 2, "--warmup", 0, "--no-memory", "--device", "cpu", "--output", output)
    stdout, _ = benchmark("side_by_side", *tiny, *once)
    result = check_line(stdout, output, name="side_by_side")
    check_comparison(result, ours="one member")
    # Three rounds of three steps are more than the epoch of two batches.
    assert list(result["sides"]) == ["2 members", "one member"]


def test_growth_writes_table_and_plot(tmp_path):
    output = tmp_path / "growth"
    once = ("--rounds", 1, "--warmup", 0, "--no-memory", "--threads", 1, "--output", output)
    stdout, _ = benchmark("growth", "--axes", "directions", "--directions", 2, *once)
    result = check_line(stdout, output.with_suffix(".jsonl"), name="growth")
    (point,) = result["points"]
    assert (point["axis"], point["value"]) == ("directions", 2)
    check_comparison(point, ours="ours")
    table = output.with_suffix(".md").read_text()
    (ratio,) = (entry["ratio"] for entry in point["time_ratios"].values())
    assert "| directions R | 2 | reference in the loop |" in table
    assert f"{ratio:.2f} (" in table
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def load(monkeypatch):
    """Import a module from the benchmarks' folder, as a script there does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("timing", "search_step", "growth"):
        sys.modules.pop(name, None)


@pytest.fixture
def timing(load):
    return load("timing")


def test_growth_measures_a_point_that_axes_share_once(load, monkeypatch, tmp_path):
    growth, timing = load("growth"), load("timing")
    measured = []

    def measure(build, options, sides, *, ours):
        measured.append((build, options))
        memory = {name: {"added_bytes": 2**20 * (1 + len(measured))} for name in sides}
        return timing.compared({name: [0.1, 0.2] for name in sides}, memory, ours=ours)

    monkeypatch.setattr(growth, "measure", measure)
    points = growth.measure_axes(growth.Growth(rounds=5))
    assert len(points) == 16
    assert len(measured) == 13
    wide = next(entry for entry in points if (entry["axis"], entry["value"]) == ("channels", 16))
    assert wide["other"] == growth.SAME_IMAGES
    steps = [options for build, options in measured if build is growth.build_step]
    assert {
        (step.channels, step.num_cells, step.batch_size, step.members, step.rounds) for step in steps
    } == {
        (4, 3, 64, 4, 5),
        (8, 3, 64, 4, 5),
        (16, 3, 64, 4, 5),
        (8, 5, 64, 4, 5),
        (8, 8, 64, 4, 5),
        (8, 3, 32, 4, 5),
        (8, 3, 128, 4, 5),
        (8, 3, 64, 1, 5),
        (8, 3, 64, 2, 5),
        (8, 3, 64, 8, 5),
    }
    assert [step.directions for build, step in measured if build is growth.build_loop_step] == [1, 4, 8]
    assert len(growth.table(points).splitlines()) == 2 + 16
    growth.plot(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_sides_take_turns_and_the_warm_up_does_not_count(timing):
    calls = []

    def side(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return run

    seconds = timing.in_turn({"a": side("a"), "b": side("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_spread_and_ratio_of_known_values(timing):
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
        "values": [4.0, 1.0, 2.0, 3.0, 5.0],
    }
    assert timing.ratio([2.0, 6.0, 4.0], [1.0, 1.0, 4.0]) == {
        "ratio": 4.0,
        "lower_quartile": 1.5,
        "upper_quartile": 4.0,
    }
    assert timing.memory_share({"added_bytes": 1}, {"added_bytes": 4}) == 0.25
    assert timing.memory_share({"added_bytes": 1}, {"added_bytes": 0}) is None


def test_the_table_holds_the_latest_line_of_each_kind(tmp_path):
    def line(ours, date):
        sides = {"textbook": {"seconds": {"median": 0.6}}, "ours": {"seconds": {"median": ours}}}
        quotient = {"ratio": 0.6 / ours, "lower_quartile": 1.0, "upper_quartile": 9.0}
        return {
            "benchmark": "retraining",
            "options": {"data": "digits", "channels": 4},
            "threads": 2,
            "sides": sides,
            "time_ratios": {"textbook / ours": quotient},
            "memory_ratios": {"ours / textbook": 0.5},
            "environment": {"time": f"{date}T00:00:00", "cpu": "a processor"},
        }

    results, output = tmp_path / "benchmarks.jsonl", tmp_path / "benchmarks.md"
    results.write_text(
        "".join(json.dumps(entry) + "\n" for entry in (line(0.3, "2026-01-01"), line(0.2, "2026-01-02")))
    )
    script = BENCHMARKS / "table.py"
    command = [sys.executable, str(script), "--results", str(results), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    text = output.read_text()
    row = (
        "| retraining, digits, C=4, 2 threads | textbook | 600 | 200 | **3.0×** (1.00 to 9.0) | 0.50× | "
        "2026-01-02, a processor |"
    )
    assert text.count("retraining") == 1
    assert row in text


def test_the_first_run_is_measured_and_tabled(tmp_path):
    tiny = {
        "search": {
            "data": {"limit_train": 96},
            "supernet": {"channels": 2, "num_nodes": 2},
            "hypernetwork": {"directions": 2},
            "bilevel": {"epochs": 2, "warmup_epochs": 1},
            "candidates": {"members": 2, "pool_size": 4},
        },
        "retrain": {"channels": 2, "epochs": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(tiny))
    output = tmp_path / "first-run"
    environment = {"time": "2026-01-31T00:00:00", "cpu": "Chip", "num_cpus": 8}
    figures = {"wall_seconds": 9.0, "cpu_seconds": 8.0, "peak_memory_mib": 700.0}
    scores = {"accuracy": 0.5, "nll": 1.0, "calibrated_nll": 0.9}
    earlier = {
        "command": "python -m dnas_ens --config tiny.json",
        **figures,
        **scores,
        "environment": environment,
    }
    of_another = earlier | {"command": "python -m dnas_ens"}
    output.with_suffix(".jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (earlier, of_another))
    )
    printed, _ = benchmark("first_run", "--output", output, "--config", tmp_path / "tiny.json")
    lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[:2] == [earlier, of_another]
    assert lines[2]["command"] == earlier["command"]
    assert printed.count("| 2026-01-31 | Chip, 8 cores | 9 | 8 | 700 | 50.00 | 1.0000 | 0.9000 |") == 1
    line = lines[2]
    assert line["wall_seconds"] > 0
    assert line["cpu_seconds"] > 0.5
    # The interpreter with PyTorch alone takes more than that.
    assert 100 < line["peak_memory_mib"] < 100_000
    assert f"| {line['wall_seconds']:.0f} | {line['cpu_seconds']:.0f} |" in printed
    assert output.with_suffix(".md").read_text() == printed
