"""What a comparison will take, method by method, before it begins.

Counts what the methods of `dnas_ens.compare.methods` train, as they count it, and multiplies by measured paces. What is
finished already is counted too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dnas_ens.compare.methods import METHODS
from dnas_ens.compare.methods.averaged_weights import GENERATIONS, KEPT_SHARE, MOST_KEPT, POPULATION
from dnas_ens.compare.methods.comparison import (
    JUDGING_IMAGES,
    STATISTICS_IMAGES,
    Comparison,
    affordable_networks,
    trained_files,
)
from dnas_ens.compare.methods.copies import width_for
from dnas_ens.compare.methods.long_training import long_epochs
from dnas_ens.compare.methods.random_cells import random_pool_of
from dnas_ens.evaluate.tables import to_markdown
from dnas_ens.run.progress import duration
from dnas_ens.search.cost import search_cost
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.cost import Estimate, Fanout, Paces, fanned_out, measured

#: Cells that are timed for the mean over random ones.
RANDOM = 3


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a method trains, beside what other methods of the comparison train anyway.

    Args:
        groups: (networks, epochs of each, pace), of networks that are trained side by side.
        alone: (networks, epochs of each, pace), of networks that are trained one after another by the command itself.
        searches: DARTS searches.
        passes: Passes over images for the statistics and the loss of one averaged network.
    """

    groups: Sequence[tuple[int, int, str]] = ()
    alone: Sequence[tuple[int, int, str]] = ()
    searches: int = 0
    passes: int = 0

    @property
    def networks(self) -> int:
        """Networks that are trained."""
        return sum(count for count, _, _ in (*self.groups, *self.alone))

    @property
    def epochs(self) -> int:
        """Epochs of all networks together."""
        return sum(count * epochs for count, epochs, _ in (*self.groups, *self.alone))


def planned_work(comparison: Comparison, methods: Sequence[str], cpu_of: dict[str, float]) -> dict[str, Work]:
    """Return what the methods train for one run.

    Args:
        methods: Names in `METHODS`; what several need is the first one's.
        cpu_of: CPU seconds of a training with the run's epochs, by pace: ``base``, ``member``, ``random``.
    """
    count, epochs, budget = comparison.num_members, comparison.recipe.epochs, comparison.budget
    own = [float(member["cpu_seconds"]) for member in trained_files(comparison.folder, count)]
    grown = comparison.sizes[-1] - count
    largest = comparison.search_seconds + sum(own) + grown * cpu_of["member"]
    total = comparison.search_seconds + sum(own)

    def within(first: int, seconds: float, pace: str) -> list[tuple[int, int, str]]:
        wanted = affordable_networks([cpu_of[pace]] * first, seconds)
        return [(part, epochs, pace) for part in (first, wanted - first) if part]

    def at_other_epochs(networks: int, pace: str) -> list[tuple[int, int, str]]:
        lengths = [length for length in budget.epochs_grid if length != epochs]
        return [(comparison.networks_of(networks, length), length, pace) for length in lengths]

    base = within(count, largest, "base")
    affordable = affordable_networks([cpu_of["base"]] * count, total)
    pool = within(budget.pool_size, largest if budget.members_grid else 0.0, "random")
    long = long_epochs(comparison)
    constant = min(long, max(2, round(KEPT_SHARE * long)))
    kept = constant // -(-constant // MOST_KEPT)
    evolving = POPULATION * (1 + GENERATIONS) + 1
    found = {
        "ours": Work(groups=[(grown, epochs, "member")] * bool(grown) + at_other_epochs(count, "member")),
        "base-cell": Work(groups=base + at_other_epochs(affordable, "base")),
        "best-cell": Work(groups=within(count, largest - total, "member")),
        "random-cells": Work(groups=pool + at_other_epochs(budget.pool_size, "random")),
        "best-random-cell": Work(groups=[*pool[: "random-cells" not in methods], (count, epochs, "random")]),
        "deviations": Work(groups=[(count, epochs, "base")]),
        "darts-ens": Work(groups=[(count, epochs, "random")], searches=count),
        "nes-re": Work(alone=[(budget.pool_size, epochs, "random")]),
        "snapshots": Work(alone=[(1, long, "base")]),
        # Equal, linear and decaying averages and the stops of every number of models, the soup, EMA and last.
        "averaged-weights": Work(alone=[(1, long, "base")], passes=6 * kept + evolving + 2),
        "evolved-network": Work(groups=[] if "base-cell" in methods else base, passes=evolving),
        "wider": Work(alone=[(1, epochs, "wide")]),
    }
    if count < 2:
        found["evolved-network"] = Work()
    return {name: found[name] for name in METHODS if name == "ours" or name in methods}


def plan_text(
    comparisons: Sequence[Comparison], methods: Sequence[str], *, price: float | None = None
) -> tuple[str, Estimate]:
    """Measure the paces and return the table of what each method will take, with the sums; and the sum."""
    first = comparisons[0]
    fanout = Fanout(workers=first.workers, engine=first.engine, device=first.device)
    gpu, num_val, data = first.device.type == "cuda", len(first.data.val), first.data
    cells: dict[Hashable, Genotype] = {
        "base": first.base,
        **{("member", index): cell for index, cell in enumerate(first.genotypes[:RANDOM])},
        **{("random", index): cell for index, cell in enumerate(random_pool_of(first, RANDOM))},
    }
    together = measured(cells, data, first.recipe, fanout, count=first.num_members)
    one = Fanout(workers=1, engine="local", device=first.device)
    alone = measured(cells, data, first.recipe, one, count=1)
    wide = alone
    if "wider" in methods:
        parameters = sum(member["parameters"] for member in trained_files(first.folder, first.num_members))
        recipe = replace(first.recipe, channels=width_for(first, parameters))
        wide = measured({"wide": first.base}, data, recipe, one, count=1)

    def of(paces: Paces, kind: str) -> Paces:
        if kind == "wide":
            return wide
        return replace(paces, of={name: pace for name, pace in paces.of.items() if name == kind or name[0] == kind})  # type: ignore[index]

    epochs = first.recipe.epochs
    cpu_of = {kind: epochs * of(together, kind).mean().epoch_cpu for kind in ("base", "member", "random")}
    searching = Estimate(gpu=gpu)
    if "darts-ens" in methods:
        cost = search_cost(first.further_search("optimal", members=1), first.recipe, data, device=first.device)
        wall = cost.search_seconds
        searching = Estimate(wall=wall, cpu=wall if gpu else wall * cost.busy, gpu=gpu)
    image = of(alone, "base").mean().image
    passed = min(STATISTICS_IMAGES, len(data.train)) + min(JUDGING_IMAGES, len(data.val))

    def taken(work: Work) -> Estimate:
        every = Estimate(gpu=gpu)
        for networks, length, kind in work.groups:
            # Of one training there is no pool.
            paces = of(together if networks > 1 else alone, kind)
            every += fanned_out(paces, [length] * networks, num_val, gpu=gpu)
        for networks, length, kind in work.alone:
            every += fanned_out(of(alone, kind), [length] * networks, num_val, gpu=gpu)
        for _ in range(work.searches):
            every += searching
        # Val and test are predicted with all, and averages are judged.
        images = work.networks * (num_val + len(data.test)) + work.passes * passed
        return every + Estimate(wall=images * image, cpu=images * image, gpu=gpu)

    rows: list[dict[str, Any]] = []
    sums = Estimate(gpu=gpu)
    hours = "GPU-hours" if gpu else "CPU-hours"
    for method, work in planned_work(first, methods, cpu_of).items():
        estimate = taken(work)
        for _ in comparisons:
            sums += estimate
        rows.append(
            {
                "method": method,
                "networks trained": work.networks,
                "epochs in all": work.epochs,
                "searches": work.searches,
                "time": duration(estimate.wall),
                hours: f"{estimate.cpu / 3600:.3g}",
            }
        )
    pace = of(together, "base").mean()
    text = (
        to_markdown(rows, tuple(rows[0]))
        + f"\nOne epoch of the base cell took {pace.epoch:.3g} s in a trial, {together.slots} side by side. "
        "What is finished is counted too.\n"
        + f"{len(comparisons)} run{'s' if len(comparisons) > 1 else ''}: "
        + ", ".join(f"{name} {value}" for name, value in sums.facts(price).items())
        + "\n"
    )
    return text, sums
