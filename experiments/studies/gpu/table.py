"""The table and the figure of a session on a GPU, from its lines alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnas_ens.compare.records import append_line, read_lines
from dnas_ens.metrics.calibration import apply_temperature, fit_temperature
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.run.files import with_ending, write_atomic

#: By name; the last of a name counts.
Records = Mapping[str, Any]
BATCHES = (64, 256)
TEXTBOOK_PAIR, TEXTBOOK = "textbook, same images", "textbook"


def write_table(folder: Path, output: Path) -> None:
    """Write OUTPUT.md, OUTPUT.png and OUTPUT.jsonl.

    Args:
        folder: Of the session, with results.jsonl and the log-probabilities of its comparison.
        output: Path without its ending.
    """
    lines = read_lines(folder / "results.jsonl")
    lines += _scores(folder, lines)
    # The latest run of a section counts.
    records = {line["name"]: line for line in lines if "name" in line}
    ends = {line["section"]: line for line in lines if "end" in line}
    parts = _machine(records, ends) + _days(lines)
    for part in (_comparison, _search, _training, _side_by_side, _losses, _kernels, _tests):
        parts += part(records)
    write_atomic(with_ending(output, ".md"), ("\n".join(parts) + "\n").encode())
    file = with_ending(output, ".jsonl")
    file.unlink(missing_ok=True)
    for line in lines:
        append_line(file, line)
    _figure(records, with_ending(output, ".png"))
    print(f"wrote {output}.md, .png and .jsonl")


def section(title: str, text: Sequence[str], headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a section's title, paragraphs and table, text to the left and figures to the right; none without rows."""
    if not rows:
        return []
    rule = [":--", *["--:"] * (len(headings) - 1)]
    table = ["| " + " | ".join(row) + " |" for row in (headings, rule, *rows)]
    return [title, "", *(line for paragraph in text for line in (paragraph, "")), *table, ""]


def _after(prefix: str, records: Records) -> dict[str, Any]:
    """Return the records whose names begin so, by the rest of the name."""
    return {name.removeprefix(prefix): record for name, record in records.items() if name.startswith(prefix)}


def _machine(records: Records, ends: Mapping[int, Any]) -> list[str]:
    env = records.get("environment", {})
    packages = env.get("packages", {})
    card = env.get("cuda_device") or env.get("cpu", "unknown")
    lines = [
        f"# Measured on one {card}",
        "",
        f"{env.get('time', '')[:10]}, {card}, torch {packages.get('torch')}, CUDA {env.get('cuda')}, Python "
        f"{env.get('python')}, {env.get('num_cpus')} cores of {env.get('cpu')}. Command: "
        "`python experiments/gpu_session.py`; every figure and all timings are in the .jsonl beside this. Medians of "
        "sides timed in turn in one process. The search is the soft one of the preset `fast` in the space `darts` "
        "(five cells, C=16, four members a step), a member that of the same preset (eight cells, C=16), both on "
        "Fashion-MNIST.",
        "",
    ]
    unfinished = [f"{number} ({line['end']})" for number, line in sorted(ends.items()) if line["end"] != "done"]
    if unfinished:
        lines += [f"**Not finished**: sections {', '.join(unfinished)}; what they had measured is below.", ""]
    if "copy bandwidth" in records:
        copied = records["copy bandwidth"]["bytes_per_second"]["median"]
        rates = [
            f"{precision} {records[f'product {precision}']['operations_per_second']['median'] / 1e12:.0f} TFLOP/s"
            for precision in ("bfloat16", "float32")
            if f"product {precision}" in records
        ]
        lines += [
            f"Ceilings: a copy {copied / 1e12:.2f} TB/s; a product of 8192 × 8192: {', '.join(rates)}.",
            "",
        ]
    return lines


def _days(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what says which day a section was measured on, where several sessions are put together."""
    day, days = "", dict[int, list[str]]()
    for line in lines:
        if line.get("name") == "environment":
            day = line["time"][:10]
        if "section" in line and "name" in line and day not in days.setdefault(line["section"], []):
            days[line["section"]].append(day)
    of_days = dict[str, list[str]]()
    for number, those in sorted(days.items()):
        of_days.setdefault(" and ".join(those), []).append(str(number))
    said = "; ".join(f"{', '.join(numbers)} on {those}" for those, numbers in of_days.items())
    return [f"Sections were measured on several days, by the code of each: {said}.", ""] if len(of_days) > 1 else []


def _medians(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: seconds["median"] for name, seconds in record["seconds"].items()}


def _rows(record: Mapping[str, Any], label: str, beside: str) -> list[list[str]]:
    """Return a row for every side: its time, the quotient with another side's, its memory."""
    rows, medians = [], _medians(record)
    for name, seconds in medians.items():
        quotient = "" if beside not in medians or name == beside else f"{medians[beside] / seconds:.1f}×"
        memory = record.get("peak_memory", {}).get(name)
        added = "" if memory is None else f"{memory['added_bytes'] / 2**20:,.0f}"
        time = f"{1000 * seconds / record.get('batches', 1):.1f}"
        rows.append([f"{label}, {name}", time, quotient, added])
    return rows


def _search(records: Records) -> list[str]:
    rows, floors = [], []
    for batch in BATCHES:
        if record := records.get(f"search pair, batch {batch}"):
            rows += _rows(record, f"batch {batch}", TEXTBOOK_PAIR)
            moved = record["bytes_bfloat16"]
            if "copy bandwidth" in records:
                seconds = moved / records["copy bandwidth"]["bytes_per_second"]["median"]
                recorded = _medians(record).get("channels_last bfloat16 CUDA graph")
                floors.append(
                    f"batch {batch}: {moved / 1e9:.1f} GB, {1000 * seconds:.1f} ms"
                    + (f", of which the recorded pair takes {recorded / seconds:.1f} times" if recorded else "")
                )
        if loop := records.get(f"search loop, batch {batch}"):
            rows += _rows(loop, f"batch {batch}, whole loop", TEXTBOOK_PAIR)
        if hard := records.get(f"hard paths, batch {batch}"):
            rows += _rows(hard, f"batch {batch}, hard paths in the efficient space", TEXTBOOK_PAIR)
    table = section(
        "## A pair of search steps",
        [
            "One gradient of the mixture weights and one of the supernet's weights, for four members. Textbook: the "
            "per-edge supernet, a pass for each member over its share of the images, contiguous float32, eager."
        ],
        ["side", "ms a pair", "textbook's time / its", "MiB added"],
        rows,
    )
    floor = (
        f"Bytes that PyTorch's operations read and write in the bfloat16 pair, and the time of their copy: "
        f"{'; '.join(floors)}. Our own kernels are not counted among them, so the true floor is higher."
    )
    return [*table, floor, ""] if rows else []


def _training(records: Records) -> list[str]:
    rows, lines = [], []
    for batch in BATCHES:
        if record := records.get(f"training, batch {batch}"):
            rows += _rows(record, f"batch {batch}", TEXTBOOK)
        if epoch := records.get(f"epoch, batch {batch}"):
            taken = ", then ".join(f"{value:.1f} s" for value in epoch["seconds"])
            lines += [
                f"An epoch of {epoch['images']:,} images, batch {batch}, {epoch['execution']}: {taken} (the first with "
                "compiling and recording).",
                "",
            ]
    table = section(
        "## A training step of a member",
        ["Textbook: DataLoader with eight workers over PIL images, eager float32, contiguous."],
        ["side", "ms a step", "textbook's time / its", "MiB added"],
        rows,
    )
    return [*table, *lines] if rows else []


def _side_by_side(records: Records) -> list[str]:
    rows = []
    for name, record in _after("side by side, ", records).items():
        medians = _medians(record)
        rows += [
            [
                f"{name}, {count} member{'s' * (count != '1')}",
                f"{1000 * seconds / record['steps']:.1f}",
                f"{seconds / medians['1']:.2f}×",
            ]
            for count, seconds in medians.items()
        ]
    headings = ["what", "ms a step of all", "of one member's time"]
    return section("## Members side by side", [], headings, rows)


def _scores(folder: Path, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for every method whose log-probabilities are in the folder; test is read here alone."""
    file = folder / "log-probs.npz"
    if not file.exists():
        return []
    from dnas_ens.data import load_data

    (plan,) = [line for line in lines if line.get("name") == "comparison plan"][-1:]
    data = load_data(plan["data"])
    labels = {"val": data.val.labels.numpy(), "test": data.test.labels.numpy()}
    scores = []
    with np.load(file, allow_pickle=False) as stored:
        for method in dict.fromkeys(key.rsplit(", ", 1)[0] for key in stored):
            probs = {name: np.exp(stored[f"{method}, {name}"].astype(np.float64)) for name in labels}
            # Half precision leaves sums that differ from 1 in the fourth digit.
            probs = {name: value / value.sum(-1, keepdims=True) for name, value in probs.items()}
            averaged = {name: value.mean(axis=0) for name, value in probs.items()}
            temperature = fit_temperature(averaged["val"], labels["val"])
            calibrated = apply_temperature(averaged["test"], temperature)
            scores.append(
                {
                    "name": f"scores, {method}",
                    "calibrated_nll": nll(calibrated, labels["test"]),
                    "accuracy": accuracy(averaged["test"], labels["test"]),
                    "member_nll": float(np.mean([nll(member, labels["test"]) for member in probs["test"]])),
                    "temperature": temperature,
                }
            )
    return scores


def _comparison(records: Records) -> list[str]:
    title, found = "## Ensembles of equal seconds", _after("comparison, ", records)
    scores = {method: score for method, score in _after("scores, ", records).items() if method in found}
    if not scores:
        missing = "Not measured: section 7 did not come to its turn on a GPU. It is written and rehearsed."
        return [title, "", missing, ""]
    rows = []
    for method in sorted(scores, key=lambda method: float(scores[method]["calibrated_nll"])):
        record, score = found[method], scores[method]
        rows.append(
            [
                f"{method}, {record['members']}" + ("" if method == "resnet20" else f" of C={record['size']}"),
                f"{score['calibrated_nll']:.4f}",
                f"{100 * score['accuracy']:.2f}",
                f"{score['member_nll']:.4f}",
                str(record["epochs"]),
                f"{record['seconds']:.0f}",
            ]
        )
    text = [
        "All images of Fashion-MNIST, one seed; what a search takes is part of a method's seconds. Epochs are those of "
        "each member, for a budget of all its trainings together. Temperatures are fitted on val."
    ]
    failed = [f"{method} failed." for method in _after("failed, ", records) if method not in scores]
    headings = ["method", "calibrated NLL", "accuracy %", "mean member's NLL", "epochs", "seconds"]
    return section(title, [*text, *failed], headings, rows)


def _losses(records: Records) -> list[str]:
    keys = ("eager again", "recorded")
    rows = [
        [what, *[f"{record['largest_difference'].get(key, float('nan')):.1e}" for key in keys]]
        for what, record in _after("losses of ", records).items()
    ]
    text = "Largest difference of twenty losses to those of an eager run, of a second eager run and of a recorded one."
    return section("## Recorded against eager", [text], ["what", *keys], rows)


def _kernels(records: Records) -> list[str]:
    lines = []
    titles = {"depthwise": "Depthwise", "gram": "Gram matrices", "pointwise": "Grouped products"}
    for part, title in titles.items():
        found = [record for record in records.values() if record.get("part") == part]
        names = list(dict.fromkeys(name for record in found for name in record["variants"]))
        rows = [[record["name"], *[_microseconds(record["variants"].get(name)) for name in names]] for record in found]
        lines += section(f"### {title}", [], ["µs, forward and backward", *names], rows)
    return ["## Kernels, replayed from a CUDA graph", "", *lines] if lines else []


def _microseconds(variant: Mapping[str, Any] | None) -> str:
    if variant is None:
        return ""
    return f"{1e6 * variant['seconds']['median']:.0f}" if "seconds" in variant else "failed"


def _tests(records: Records) -> list[str]:
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


def _figure(records: Records, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = ("search pair", "a pair of search steps"), ("training", "a training step of a member")
    for axes, (prefix, title) in zip(figure.subplots(1, 2), panels, strict=True):
        found = {batch: records.get(f"{prefix}, batch {batch}", {"seconds": {}}) for batch in BATCHES}
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
