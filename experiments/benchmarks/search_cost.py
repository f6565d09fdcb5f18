"""What does a search cost at every preset, counted in trainings of a member?

    python experiments/benchmarks/search_cost.py

For every preset, space and kind of search it measures a few steps of the search and of members of random cells in one
process and predicts the rest: steps of the search and the scoring of its candidates over the steps of one training.
Images are random ones of the preset's sizes, so that no data set is needed; where a step takes long, parts of its batch
predict it. Writes OUTPUT.md and a line to OUTPUT.jsonl. A minute on one CPU core for the first two presets, five for
all.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timing import RESULTS, parse_benchmark, tell

from dnas_ens.commands.parse import run_main
from dnas_ens.compare.records import append_line
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.run.files import with_ending, write_atomic
from dnas_ens.run.machine import environment

if TYPE_CHECKING:
    from dnas_ens.data import ImageData

#: Training images, validation images, side and channels of each preset's data.
SIZES = {
    "smoke": (1_079, 359, 8, 1),
    "micro": (10_000, 10_000, 28, 1),
    "fast": (50_000, 10_000, 28, 1),
    "paper": (40_000, 10_000, 32, 3),
}
#: What each kind of search changes in its preset.
KINDS: dict[str, dict[str, Any]] = {
    "as the preset has it": {},
    "hard paths, not scored": {"relaxation": "gumbel-hard", "operation_balance": (0.0, 0.0), "score_images": 0},
    "soft paths": {"relaxation": "softmax"},
    "the star alone": {"likelihood": "none"},
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Options of the benchmark."""

    presets: tuple[Literal["smoke", "micro", "fast", "paper"], ...] = ("smoke", "micro", "fast", "paper")
    """Which presets."""
    spaces: tuple[Literal["efficient", "darts"], ...] = ("efficient", "darts")
    """Which spaces."""
    threads: int = 1
    """Threads of PyTorch."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    output: Path = RESULTS / "search-cost"
    """Where OUTPUT.md and OUTPUT.jsonl go."""


def random_images(preset: str) -> ImageData:
    """Return random images of a preset's sizes."""
    import torch

    from dnas_ens.data import ImageData, Split

    num_train, num_val, side, channels = SIZES[preset]
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        shape = (count, channels, side, side)
        return Split(torch.randint(256, shape, generator=generator, dtype=torch.uint8), torch.arange(count) % 10)

    classes = tuple(map(str, range(10)))
    return ImageData.from_splits(
        "random", classes, train=split(num_train), val=split(num_val), test=split(20), flip=False
    )


def measure(options: Cost) -> list[dict[str, Any]]:
    """Predict the cost of every search."""
    import torch

    from dnas_ens.search.cost import search_cost

    torch.set_num_threads(options.threads)
    rows = []
    for preset in options.presets:
        data = random_images(preset)
        for space in options.spaces:
            for kind, fields in KINDS.items():
                config = with_fields(search_preset(preset, space=space), **fields)
                cost = search_cost(config, retrain_preset(preset, space), data, device=torch.device(options.device))
                pair = sum(cost.seconds.get(name, 0.0) for name in ("weights", "architecture"))
                step = cost.seconds.get("penalties", cost.seconds.get("joint", pair))
                rows.append(
                    {
                        "preset": preset,
                        "space": space,
                        "search": kind,
                        "member_ms": 1000 * cost.seconds["member"],
                        "step_ms": 1000 * step,
                        "scoring_share": cost.counts.get("scoring", 0)
                        * cost.seconds.get("scoring", 0.0)
                        / cost.search_seconds,
                        "trainings": cost.trainings,
                    }
                )
                tell(f"{preset}, {space}, {kind}: {cost}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of all searches."""
    head = (
        "| preset | space | search | a member's step, ms | a step of the search, ms | of it scoring, % | "
        "trainings of a member |\n|:--|:--|:--|--:|--:|--:|--:|\n"
    )
    return head + "".join(
        f"| {row['preset']} | {row['space']} | {row['search']} | {row['member_ms']:,.1f} | {row['step_ms']:,.1f} | "
        f"{100 * row['scoring_share']:.0f} | {row['trainings']:{'.1g' if row['trainings'] < 1 else '.1f'}} |\n"
        for row in rows
    )


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    from dnas_ens.compare.report import provenance

    options = parse_benchmark("search_cost", __doc__, Cost(), argv)
    rows = measure(options)
    env = environment(["python", "experiments/benchmarks/search_cost.py", *argv])
    append_line(with_ending(options.output, ".jsonl"), {"rows": rows, "environment": env})
    text = (
        "# What does a search cost, in trainings of a member?\n\n"
        f"{provenance(env, hardware=f'{options.device}, {options.threads} threads')}\n\n"
        "Predicted from a few measured steps. A step of the search is a pair, one of the weights and one of the "
        "architecture, on half the training images each; along hard paths one step on all of them does both; the "
        "star alone takes 500 steps without images. Members have random cells, the mean over three. Searches are "
        "measured one after the other.\n\n" + table(rows)
    )
    write_atomic(with_ending(options.output, ".md"), text.encode())
    print(f"wrote {with_ending(options.output, '.md')}")


if __name__ == "__main__":
    sys.exit(run_main(main))
