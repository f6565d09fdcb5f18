"""The table and the figure of a session on a GPU, from its lines alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnas_ens.metrics.calibration import apply_temperature, fit_temperature
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.run.files import write_atomic
from studies.records import read_lines

TEXTBOOK_PAIR, TEXTBOOK = "textbook, same images", "textbook"


def write_table(folder: Path, output: Path) -> None:
    """Write OUTPUT.md, OUTPUT.png and OUTPUT.jsonl.

    Args:
        folder: Of the session, with results.jsonl and the log-probabilities of its comparison.
        output: Path without its ending.
    """
    lines = read_lines(folder / "results.jsonl")
    # A section that was run again has the last word.
    records = {line["name"]: line for line in lines if "name" in line}
    ends = {line["section"]: line for line in lines if "end" in line}
    parts = [
        *_machine(records, ends),
        *_search(records),
        *_training(records),
        *_side_by_side(records),
        *_comparison(records, folder),
        *_losses(records),
        *_kernels(records),
        *_tests(records),
    ]
    write_atomic(output.with_suffix(".md"), ("\n".join(parts) + "\n").encode())
    shutil.copyfile(folder / "results.jsonl", output.with_suffix(".jsonl"))
    _figure(records, output.with_suffix(".png"))
    print(f"wrote {output}.md, .png and .jsonl")


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, text to the left and figures to the right."""
    rule = [":--", *["--:"] * (len(headings) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (headings, rule, *rows)] + [""]


def _machine(records: Mapping[str, Any], ends: Mapping[int, Any]) -> list[str]:
    env = records.get("environment", {})
    packages = env.get("packages", {})
    card = env.get("cuda_device") or env.get("cpu", "unknown")
    lines = [
        f"# Measured on one {card}",
        "",
        f"{env.get('time', '')[:10]}, {card}, torch {packages.get('torch')}, CUDA {env.get('cuda')}, Python "
        f"{env.get('python')}, {env.get('num_cpus')} cores of {env.get('cpu')}. Command: "
        "`python experiments/gpu_session.py`; every figure and all timings are in the .jsonl beside this. Medians of "
        "sides timed in turn in one process. The search is that of the preset `fast` (five cells, C=16, four members "
        "a step), a member that of the same preset (eight cells, C=16), both on Fashion-MNIST.",
        "",
    ]
    unfinished = [
        f"{number} ({line['end']})" for number, line in sorted(ends.items()) if line["end"] != "done"
    ]
    if unfinished:
        lines += [f"**Not finished**: sections {', '.join(unfinished)}; what they had measured is below.", ""]
    if "copy bandwidth" in records:
        copied = records["copy bandwidth"]["bytes_per_second"]["median"]
        rates = [
            f"{precision} {records[f'product {precision}']['operations_per_second']['median'] / 1e12:.0f} TFLOP/s"
            for precision in ("bfloat16", "float32")
        ]
        lines += [
            f"Ceilings: a copy {copied / 1e12:.2f} TB/s; a product of 8192 × 8192: {', '.join(rates)}.",
            "",
        ]
    return lines


def _seconds(record: Mapping[str, Any], name: str) -> float | None:
    return record["seconds"][name]["median"] if name in record["seconds"] else None


def _rows(record: Mapping[str, Any], label: str, beside: str, *, per: int = 1) -> list[list[str]]:
    """Return a row for every side: its time, the quotient with another side's, its memory."""
    rows = []
    other = _seconds(record, beside)
    for name in record["seconds"]:
        seconds = _seconds(record, name)
        assert seconds is not None
        memory = record.get("peak_memory", {}).get(name)
        rows.append(
            [
                f"{label}, {name}",
                f"{1000 * seconds / per:.1f}",
                "" if other is None or name == beside else f"{other / seconds:.1f}×",
                "" if memory is None else f"{memory['added_bytes'] / 2**20:,.0f}",
            ]
        )
    return rows


def _search(records: Mapping[str, Any]) -> list[str]:
    rows, floors = [], []
    for batch in (64, 256):
        record = records.get(f"search pair, batch {batch}")
        if record is not None:
            rows += _rows(record, f"batch {batch}", TEXTBOOK_PAIR)
            if "copy bandwidth" in records:
                bandwidth = records["copy bandwidth"]["bytes_per_second"]["median"]
                seconds = record["bytes_bfloat16"] / bandwidth
                recorded = _seconds(record, "channels_last bfloat16 CUDA graph")
                times = (
                    ""
                    if recorded is None
                    else f", of which the recorded pair takes {recorded / seconds:.1f} times"
                )
                floors.append((batch, record["bytes_bfloat16"], f"{1000 * seconds:.1f} ms{times}"))
        loop = records.get(f"search loop, batch {batch}")
        if loop is not None:
            rows += _rows(loop, f"batch {batch}, whole loop", TEXTBOOK_PAIR)
    if not rows:
        return []
    floor = "; ".join(f"batch {batch}: {moved / 1e9:.1f} GB, {taken}" for batch, moved, taken in floors)
    return [
        "## A pair of search steps",
        "",
        "One gradient of the mixture weights and one of the supernet's weights, for four members. Textbook: the "
        "per-edge supernet, a pass for each member over its share of the images, contiguous float32, eager.",
        "",
        *markdown(["side", "ms a pair", "textbook's time / its", "MiB added"], rows),
        f"Bytes that PyTorch's operations read and write in the bfloat16 pair, and the time of their copy: {floor}. "
        "Our own kernels are not counted among them, so the true floor is higher.",
        "",
    ]


def _training(records: Mapping[str, Any]) -> list[str]:
    rows, lines = [], []
    for batch in (64, 256):
        record = records.get(f"training, batch {batch}")
        if record is not None:
            rows += _rows(record, f"batch {batch}", TEXTBOOK, per=record["batches"])
    for batch in (64, 256):
        epoch = records.get(f"epoch, batch {batch}")
        if epoch is not None:
            taken = ", then ".join(f"{value:.1f} s" for value in epoch["seconds"])
            lines.append(
                f"An epoch of {epoch['images']:,} images, batch {batch}, {epoch['execution']}: {taken} (the first with "
                "compiling and recording)."
            )
    if not rows:
        return []
    return [
        "## A training step of a member",
        "",
        "Textbook: DataLoader with eight workers over PIL images, eager float32, contiguous.",
        "",
        *markdown(["side", "ms a step", "textbook's time / its", "MiB added"], rows),
        *[part for line in lines for part in (line, "")],
    ]


def _side_by_side(records: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, record in records.items():
        if name.startswith("side by side, "):
            one = _seconds(record, "1")
            assert one is not None
            for count in record["seconds"]:
                seconds = _seconds(record, count)
                assert seconds is not None
                label = f"{name.removeprefix('side by side, ')}, {count} member{'s' * (count != '1')}"
                rows.append([label, f"{1000 * seconds / record['steps']:.1f}", f"{seconds / one:.2f}×"])
    if not rows:
        return []
    return [
        "## Members side by side",
        "",
        *markdown(["what", "ms a step of all", "of one member's time"], rows),
    ]


def _comparison(records: Mapping[str, Any], folder: Path) -> list[str]:
    found = {
        name.removeprefix("comparison, "): record
        for name, record in records.items()
        if name.startswith("comparison, ") and (folder / record["file"]).exists()
    }
    if not found:
        return [
            "## Ensembles of equal seconds",
            "",
            "Not measured: section 7 did not come to its turn on a GPU. It is written and rehearsed.",
            "",
        ]
    from dnas_ens.data import load_data

    data = load_data(records["comparison plan"]["data"])
    labels = {"val": data.val.labels.numpy(), "test": data.test.labels.numpy()}
    rows = []
    for method, record in found.items():
        with np.load(folder / record["file"], allow_pickle=False) as stored:
            probs = {name: np.exp(stored[name].astype(np.float64)) for name in ("val", "test")}
        # Half precision leaves sums that differ from 1 in the fourth digit.
        probs = {name: value / value.sum(-1, keepdims=True) for name, value in probs.items()}
        averaged = {name: value.mean(axis=0) for name, value in probs.items()}
        temperature = fit_temperature(averaged["val"], labels["val"])
        calibrated = apply_temperature(averaged["test"], temperature)
        rows.append(
            [
                f"{method}, size {record['size']}",
                f"{nll(calibrated, labels['test']):.4f}",
                f"{100 * accuracy(averaged['test'], labels['test']):.2f}",
                f"{np.mean([nll(member, labels['test']) for member in probs['test']]):.4f}",
                str(record["epochs"]),
                f"{record['seconds']:.0f}",
            ]
        )
    headings = ["method", "calibrated NLL", "accuracy %", "mean member's NLL", "epochs", "seconds"]
    return ["## Ensembles of equal seconds", "", *markdown(headings, rows)]


def _losses(records: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name.removeprefix("losses of "),
            *[f"{record['largest_difference'].get(key, float('nan')):.1e}" for key in keys],
        ]
        for keys in (("eager again", "recorded"),)
        for name, record in records.items()
        if name.startswith("losses of ")
    ]
    if not rows:
        return []
    return [
        "## Recorded against eager",
        "",
        "Largest difference of twenty losses to those of an eager run, of a second eager run and of a recorded one.",
        "",
        *markdown(["what", "eager again", "recorded"], rows),
    ]


def _kernels(records: Mapping[str, Any]) -> list[str]:
    lines = []
    for part, title in (
        ("depthwise", "Depthwise"),
        ("gram", "Gram matrices"),
        ("pointwise", "Grouped products"),
    ):
        found = [record for record in records.values() if record.get("part") == part]
        if not found:
            continue
        names = list(dict.fromkeys(name for record in found for name in record["variants"]))
        rows = [
            [record["name"], *[_microseconds(record["variants"].get(name)) for name in names]]
            for record in found
        ]
        lines += [f"### {title}", "", *markdown(["µs, forward and backward", *names], rows)]
    return ["## Kernels, replayed from a CUDA graph", "", *lines] if lines else []


def _microseconds(variant: Mapping[str, Any] | None) -> str:
    if variant is None:
        return ""
    return f"{1e6 * variant['seconds']['median']:.0f}" if "seconds" in variant else "failed"


def _tests(records: Mapping[str, Any]) -> list[str]:
    record = records.get("tests")
    if record is None:
        return []
    failed = [f"- {line.split(' - ')[0]}" for line in record["failed"]]
    return [
        "## Tests that need a GPU",
        "",
        record["summary"] + ("; failed were:" if failed else ""),
        "",
        *failed,
    ]


def _figure(records: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = ("search pair", "a pair of search steps"), ("training", "a training step of a member")
    for axes, (prefix, title) in zip(figure.subplots(1, 2), panels, strict=True):
        found = {batch: records.get(f"{prefix}, batch {batch}", {"seconds": {}}) for batch in (64, 256)}
        names = list(dict.fromkeys(name for record in found.values() for name in record["seconds"]))
        for shift, (batch, record) in zip((-0.2, 0.2), found.items(), strict=True):
            places = [names.index(name) + shift for name in record["seconds"]]
            per = record.get("batches", 1)
            times = [1000 * side["median"] / per for side in record["seconds"].values()]
            bars = axes.barh(places, times, 0.38, label=f"batch {batch}")
            axes.bar_label(bars, fmt="%.0f", padding=3, size=8)
        axes.set_yticks(range(len(names)), [name.replace(" CUDA graph", ", recorded") for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("milliseconds")
        axes.set_title(title)
        if names:
            axes.legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
