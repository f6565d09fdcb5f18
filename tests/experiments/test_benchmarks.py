"""Benchmarks at tiny sizes: what is derived agrees with what was timed, and tables show the lines."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dnas_ens as de
from dnas_ens.commands.parse import run_main

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
ONCE = ("--rounds", 1, "--warmup", 0, "--device", "cpu", "--no-memory", "--no-keep-memory")


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark; what it measures in fresh processes is measured in this one."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    timing = importlib.import_module("timing")
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: function(*arguments))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def benchmark(load, capsys):
    def run(name, *arguments):
        assert run_main(load(name).main, list(map(str, arguments))) == 0
        return capsys.readouterr()

    return run


def check_comparison(result, *, ours):
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
    (line,) = stdout.splitlines()
    assert output.read_text().splitlines()[-1] == line
    result = json.loads(line)
    assert result["benchmark"] == name
    env = result["environment"]
    assert env["command"][:2] == ["python", f"experiments/benchmarks/{name}.py"]
    assert {"time", "cpu", "num_cpus", "packages", "python", "git_revision", "cuda_device"} <= set(env)
    return result


TINY_STEP = "--image-size 4 --channels 2 --batch-size 4 --members 2 --num-cells 1"
TINY_NETWORK = "--channels 2 --num-cells 1 --batch-size 8"


@pytest.mark.parametrize(
    ("name", "arguments", "sides", "told"),
    [
        (
            "search_step",
            f"--setting 28x28 {TINY_STEP}",
            ["textbook, whole batch", "textbook, same images", "ours"],
            "textbook, same images / ours",
        ),
        ("floor", TINY_STEP, ["copy of its bytes", "ours"], "MiB read and written"),
        ("retraining", f"{TINY_NETWORK} --batches 2 --workers 0", ["textbook", "ours"], "images a second"),
        (
            "execution",
            f"--what retraining {TINY_NETWORK} --batches 1",
            ["ours", "contiguous float32", "channels_last bfloat16", "contiguous bfloat16"],
            "contiguous float32 / ours",
        ),
        ("by_hand", "--network resnet --channels 2 --batch-size 8 --batches 1", ["by hand", "ours"], "by hand / ours"),
        (
            # Three steps are more than the epoch of two batches.
            "side_by_side",
            "--members 2 --channels 2 --num-cells 1 --batch-size 512 --batches 3",
            ["2 members", "one member"],
            "2 members / one member",
        ),
    ],
)
def test_sides_are_compared(benchmark, tmp_path, name, arguments, sides, told):
    output = tmp_path / "new" / "lines.jsonl"
    stdout, stderr = benchmark(name, *arguments.split(), *ONCE, "--output", output)
    result = check_line(stdout, output, name=name)
    check_comparison(result, ours="ours" if "ours" in sides else sides[-1])
    assert list(result["sides"]) == sides
    assert (result["memory_ratios"], result["options"]["keep_memory"]) == ({}, False)
    assert told in stderr
    if name == "search_step":
        assert (result["setting"], result["options"]["channels"]) == ("28x28", 2)
    if name == "floor":
        assert result["bytes"] == sum(result["by_operation"].values()) > 0
    if name == "retraining":
        ours = result["sides"]["ours"]
        speeds = [16 / seconds for seconds in ours["seconds"]["values"]]
        assert result["images_per_round"] == 16
        assert ours["images_per_second"]["median"] == pytest.approx(statistics.median(speeds))


def test_memory_is_taken_in_processes_of_their_own(run_script, tmp_path):
    output, file = tmp_path / "lines.jsonl", tmp_path / "profile.txt"
    once = "--rounds 2 --warmup 0 --memory-steps 1 --threads 1 --device cpu"
    arguments = (*TINY_STEP.split(), *once.split(), "--profile", file, "--output", output)
    result = check_line(run_script("benchmarks/floor", *arguments)[0], output, name="floor")
    check_comparison(result, ours="ours")
    assert (result["options"]["keep_memory"], result["threads"]) == (True, 1)
    assert len(result["memory_ratios"]) == 1
    assert "convolution" in file.read_text()


def test_startup_appends_to_what_is_there(benchmark, tmp_path):
    output = tmp_path / "lines.jsonl"
    output.write_text("an earlier line\n")
    stdout, _ = benchmark("startup", "--rounds", 1, "--warmup", 0, "--output", output)
    result = check_line(stdout, output, name="startup")
    assert output.read_text() == "an earlier line\n" + stdout
    check_comparison(result, ours="search --help")
    assert result["sides"]["import torch"]["imports_torch"]
    assert not result["sides"]["search --help"]["imports_torch"]


@pytest.mark.filterwarnings("ignore")
def test_kernels(benchmark, tmp_path):
    output = tmp_path / "lines.jsonl"
    stdout, _ = benchmark("kernels", "--parts", "gram", "--batch-size", 1, *ONCE, "--output", output)
    records = check_line(stdout, output, name="kernels")["records"]
    assert len(records) == 6
    for record in records:
        assert list(record["variants"]) == ["batched", "dense"]
        for variant in record["variants"].values():
            assert variant["relative_error"] <= (1e-4 if "float32" in record["name"] else 3e-2)
            assert variant["seconds"]["median"] > 0


def test_bytes_of_known_operations(load):
    moved_bytes = load("floor").moved_bytes
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


@pytest.mark.slow
def test_several_processes_are_tabled_beside_one(benchmark, tmp_path):
    output = tmp_path / "distributed"
    tiny = "--preset smoke --works hard member --batch-sizes 8 --rounds 1 --warmup 0 --steps 2 --processes 1 2"
    stdout, _ = benchmark("distributed", *tiny.split(), "--output", output)
    rows = check_line(stdout, output.with_suffix(".jsonl"), name="distributed")["rows"]
    assert [(row["work"], row["processes"]) for row in rows] == [
        ("hard", 1),
        ("hard", 2),
        ("member", 1),
        ("member", 2),
    ]
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["speed_up"]["ratio"] == 1
        assert two["speed_up"]["ratio"] == one["seconds"][0] / two["seconds"][0]
        assert two["parameters"] == one["parameters"] > 0
    text = output.with_suffix(".md").read_text()
    assert text.count("| training step of a member | 8 | ") == 2


def test_growth_writes_table_and_plot(benchmark, tmp_path):
    output = tmp_path / "growth"
    stdout, _ = benchmark("growth", "--axes", "directions", "--directions", 2, *ONCE, "--output", output)
    result = check_line(stdout, output.with_suffix(".jsonl"), name="growth")
    (point,) = result["points"]
    assert (point["axis"], point["value"]) == ("directions", 2)
    check_comparison(point, ours="ours")
    table = output.with_suffix(".md").read_text()
    (ratio,) = (entry["ratio"] for entry in point["time_ratios"].values())
    assert "| directions R | 2 | reference in the loop |" in table
    assert f"{ratio:.2f} (" in table
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_table_holds_the_latest_line_of_each_kind(benchmark, tmp_path):
    def line(ours, date, name="retraining"):
        return {
            "benchmark": name,
            "options": {"data": "digits", "channels": 4},
            "threads": 2,
            "sides": {"textbook": {"seconds": {"median": 0.6}}, "ours": {"seconds": {"median": ours}}},
            "time_ratios": {"textbook / ours": {"ratio": 0.6 / ours, "lower_quartile": 1.0, "upper_quartile": 9.0}},
            "memory_ratios": {"ours / textbook": 0.5},
            "environment": {"time": f"{date}T00:00:00", "cpu": "a processor"},
        }

    results, output = tmp_path / "benchmarks.jsonl", tmp_path / "benchmarks.md"
    # Kernels have no sides and no rows.
    lines = [line(0.3, "2026-01-01"), line(0.2, "2026-01-02"), {"benchmark": "kernels", "records": []}]
    results.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    benchmark("table", "--results", results, "--output", output)
    (row,) = [line for line in output.read_text().splitlines() if line.startswith("| retraining")]
    assert row == (
        "| retraining, digits, C=4, 2 threads | textbook | 600 | 200 | **3.0×** (1.00 to 9.0) | 0.50× | "
        "2026-01-02, a processor |"
    )
    # What is published is what the script makes of the published lines.
    benchmark("table", "--output", output)
    assert output.read_text() == (BENCHMARKS.parent / "results" / "benchmarks.md").read_text()


def test_the_first_run_is_measured_and_tabled(benchmark, tmp_path, read_lines):
    tiny = {
        "search": {
            "data": {"limit_train": 96},
            "supernet": {"channels": 2, "num_nodes": 2, "num_cells": 1},
            "hypernetwork": {"directions": 2},
            "bilevel": {"epochs": 2, "warmup_epochs": 1},
            "candidates": {"members": 2, "pool_size": 4},
        },
        "retrain": {"channels": 2, "epochs": 1, "num_cells": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(tiny))
    output = tmp_path / "first-run"
    earlier = {"command": "python -m dnas_ens --config tiny.json", "wall_seconds": 9.0, "cpu_seconds": 8.0}
    earlier |= {"peak_memory_mib": 700.0, "accuracy": 0.5, "nll": 1.0, "calibrated_nll": 0.9}
    earlier |= {"environment": {"time": "2026-01-31T00:00:00", "cpu": "Chip", "num_cpus": 8}}
    of_another = earlier | {"command": "python -m dnas_ens"}
    file = output.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in (earlier, of_another)))
    printed, _ = benchmark("first_run", "--output", output, "--config", tmp_path / "tiny.json", "--seeds", 2)
    *before, first, line = read_lines(file)
    assert before == [earlier, of_another]
    assert (first["seed"], line["seed"]) == (0, 1)
    accuracies = [100 * first["accuracy"], 100 * line["accuracy"]]
    expected = f"accuracy, %, {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    assert "Over the 2 seeds of the last revision: wall seconds" in printed
    assert expected in printed
    assert line["command"] == earlier["command"]
    assert printed.count("| 2026-01-31 | Chip, 8 cores | 0 | 9 | 8 | 700 | 50.00 | 1.0000 | 0.9000 |") == 1
    assert line["wall_seconds"] > 0
    assert line["cpu_seconds"] > 0.5
    # The interpreter with PyTorch alone takes more than that.
    assert 100 < line["peak_memory_mib"] < 100_000
    assert f"| {line['wall_seconds']:.0f} | {line['cpu_seconds']:.0f} |" in printed
    assert output.with_suffix(".md").read_text() == printed


@pytest.mark.slow
def test_a_budget_has_a_row_for_each_number_of_workers(benchmark, tmp_path, read_lines):
    tiny = ["--data", "digits", "--limit-train", 96, "--image-size", 8, "--budget", "2s", "--seeds", 1]
    printed, _ = benchmark("budget_workers", *tiny, "--workers", 1, 2, "--output", tmp_path / "side")
    lines = read_lines(tmp_path / "side.jsonl")
    assert [line["workers"] for line in lines] == [1, 2]
    for line in lines:
        assert line["networks"] >= 1
        assert 1 <= line["trainings"] <= line["epochs"]
        row = f"| {line['workers']} | {line['spent']:.0f} | {line['trainings']:.1f} | {line['epochs']:.0f} |"
        assert row in (tmp_path / "side.md").read_text()
    assert "2s" in printed


def test_the_server_of_the_guide_answers_as_predict_does(load, few_digits, tmp_path):
    ensemble = de.spend(few_digits, 1, folder=tmp_path / "R", channels=4, batch_size=16, device="cpu")
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, image in zip(paths, few_digits.test.images, strict=False):
        Image.fromarray(image[0].numpy()).resize((50, 40)).save(path)
    answers, seconds = load("own_pictures").ask_server(tmp_path, paths)
    assert seconds > 0
    for row, answer in zip(ensemble.predict(paths, top_k=3), answers, strict=True):
        assert answer["label"] == row["label"]
        assert answer["probability"] == pytest.approx(row["probability"], abs=1e-5)
        assert [name for name, _ in answer["top"]] == [name for name, _ in row["top"]]


def test_expected_step_times_are_compared_with_measured_ones(benchmark, tmp_path):
    output = tmp_path / "lines.jsonl"
    tiny = "--setting digits --channels 2 --num-cells 1 --batch-size 4 --networks 3 --rounds 1 --warmup 0"
    stdout, stderr = benchmark("step_time", *tiny.split(), "--output", output)
    result = check_line(stdout, output, name="step_time")
    ranks = (sorted(range(3), key=result[name].__getitem__) for name in ("expected_ms", "measured_ms"))
    assert (next(ranks) == next(ranks)) == (result["spearman"] == 1.0)
    assert min(result["expected_ms"] + result["measured_ms"]) > 0
    assert "3 networks of" in stderr


def test_a_study_on_slots_ends_when_its_stages_let_it(load):
    makespan = load("cost_model").makespan
    run = [(3, 2.0), (1, 5.0)]
    # One after another; then what is side by side, and what waits for it.
    assert makespan([run], 1) == 11
    assert makespan([run], 2) == 9
    assert makespan([run], 64) == 7
    # Two runs share: six tasks on three slots, then both long ones side by side.
    assert makespan([run, run], 3) == 9
    assert makespan([run, run], 1) == 22


@pytest.mark.slow
def test_the_cost_model_is_tabled_beside_what_was_measured(benchmark, load, tmp_path, monkeypatch, read_lines):
    script = load("cost_model")
    monkeypatch.setattr(script, "SEARCH", {"epochs": 1, "warmup_epochs": 0, "members": 2, "pool_size": 2})
    monkeypatch.setattr(script, "METHODS", ("snapshots",))
    output = tmp_path / "cost"
    small = ("--epochs", 1, "--channels", 4, "--tasks", 2, "--engines", "local")
    printed, _ = benchmark("cost_model", *small, "--output", output)
    (line,) = read_lines(output.with_suffix(".jsonl"))
    assert line["rows"][0]["work"] == "search"
    assert len(line["rows"]) == 4
    for row in line["rows"]:
        assert row["predicted"]["wall"] > 0
        assert row["measured"]["cpu"] > 0
    assert set(line["tasks"]) == {"local"}
    assert output.with_suffix(".md").read_text() + f"\nwrote {output}.md\n" == printed
    assert "projection, not measured" in printed


def test_the_cost_of_a_search_is_tabled(benchmark, load, tmp_path, monkeypatch, read_lines):
    script = load("search_cost")
    tiny = {"num_cells": 1, "channels": 2, "num_nodes": 2, "batch_size": 16, "epochs": 3}
    monkeypatch.setattr(script, "SIZES", {"smoke": (40, 20, 8, 1)})
    monkeypatch.setattr(script, "KINDS", {"soft": tiny, "star": {**tiny, "likelihood": "none"}})
    output = tmp_path / "cost"
    printed, stderr = benchmark("search_cost", "--presets", "smoke", "--spaces", "darts", "--output", output)
    assert printed == f"wrote {output}.md\n"
    assert "smoke, darts, star: " in stderr
    (line,) = read_lines(output.with_suffix(".jsonl"))
    assert [row["search"] for row in line["rows"]] == ["soft", "star"]
    assert [row["scoring_share"] > 0 for row in line["rows"]] == [True, False]
    text = output.with_suffix(".md").read_text()
    assert text.count("| smoke | darts | ") == 2
