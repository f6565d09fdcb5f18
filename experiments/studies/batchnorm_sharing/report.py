"""OUTPUT.md with all that is needed to repeat it, and the picture of both rankings of the pools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dnas_ens.run.files import with_ending
from studies.batchnorm_sharing.measures import DECIMALS, measures, ranking, table, verdict
from studies.batchnorm_sharing.options import SETTINGS
from studies.batchnorm_sharing.records import Records
from studies.report import provenance, write_results


def report(records: Records, command: Sequence[str]) -> str:
    """Write table and plot of the complete seeds and return the table with its verdict; empty without any."""
    from dnas_ens.metrics.significance import mean_and_deviation
    from dnas_ens.run.machine import environment

    study, seeds = records.study, records.complete_seeds()
    if not seeds:
        return ""
    found = {setting: [measures(records, setting, seed) for seed in seeds] for setting in SETTINGS}
    trained = [
        rank.retrained[rank.random].mean() for rank in (ranking(records, "slices", seed) for seed in seeds)
    ]
    text = (
        f"{table(found, seeds)}\n{verdict(found)}\nRetrained val NLL of the random genotypes, which both settings "
        f"share: {mean_and_deviation(trained, digits=DECIMALS)}.\n"
    )
    config, recipe = study.configuration(SETTINGS[0], seeds[0]), study.recipe(seeds[0])
    limit = f", {config.data.limit_train} training images" if config.data.limit_train else ""
    header = (
        f"# What does sharing BatchNorm statistics do to a search? ({study.data}, preset {config.preset})\n\n"
        f"{provenance(environment(command), hardware='no GPU, one thread a search')}\n\n"
        f"{config.bilevel.epochs} epochs a search{limit}, m = {config.objective.drawn_members} members a step, "
        f"R = {config.hypernetwork.directions} directions, batches of {config.bilevel.batch_size}: *slices* "
        f"normalises with statistics over {config.bilevel.batch_size} images of m architectures, *separate* over "
        f"{config.bilevel.batch_size // config.objective.drawn_members} images of one. Mean ± standard deviation "
        f"over {len(seeds)} seeds, then slices minus separate. Both searches of a seed begin with the same weights "
        f"and see the same images and draws. Pool: {study.num_random} random genotypes, the same in both settings, "
        f"and up to {study.pool - study.num_random} candidates of the search. Kendall's τ is between val NLL "
        "with inherited weights (BatchNorm statistics measured anew for each network) and val NLL after "
        f"{recipe.epochs} epochs from scratch, each trained once, so that it carries the noise of one training. "
        "NLL in nats. Relaxed accuracy: the base, on the statistics of each batch; the gap is from there to its "
        "discretisation with inherited weights. Test images were not read.\n\n"
    )
    write_results(study.path, header + text)
    plot(records, seeds, with_ending(study.path, ".png"))
    return text


def plot(records: Records, seeds: Sequence[int], path: Path) -> None:
    """Draw supernet NLL against retrained NLL, a panel a setting."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    from dnas_ens.figures.style import CYCLE, MARKERS, MUTED_COLOUR, font, new_figure, style_axis
    from dnas_ens.metrics.significance import mean_and_deviation

    figure = new_figure(620, 330)
    axes = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for position, seed in enumerate(seeds):
            ranks = ranking(records, setting, seed)
            colour, marker = CYCLE[position % len(CYCLE)], MARKERS[position % len(MARKERS)]
            for chosen, face in ((ranks.random, "none"), (~ranks.random, colour)):
                axis.scatter(
                    ranks.supernet[chosen],
                    ranks.retrained[chosen],
                    s=24,
                    marker=marker,
                    facecolors=face,
                    edgecolors=colour,
                    linewidths=1,
                    alpha=0.8,
                )
        # NLLs differ by factors.
        axis.set_xscale("log")
        axis.set_yscale("log")
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            direction.set_major_formatter("{x:g}")
            direction.set_minor_locator(NullLocator())
        style_axis(
            axis,
            x_label="val NLL, inherited weights",
            y_label="val NLL, trained from scratch" if axis is axes[0] else "",
        )
        found = [measures(records, setting, seed) for seed in seeds]
        pool, drawn = (
            mean_and_deviation([values[name] for values in found], digits=2)
            for name in ("tau_pool", "tau_random")
        )
        shares = "shared statistics" if setting == "slices" else "each member's own statistics"
        axis.set_title(
            f"{setting}: {shares}\nτ {pool}; random alone {drawn}",
            fontproperties=font(9, bold=True),
            loc="left",
        )
    handles = [
        Line2D([], [], linestyle="", marker="o", color=MUTED_COLOUR, markerfacecolor="none", label="random"),
        Line2D([], [], linestyle="", marker="o", color=MUTED_COLOUR, label="candidate of the search"),
        *(
            Line2D(
                [],
                [],
                linestyle="",
                marker=MARKERS[position % len(MARKERS)],
                color=CYCLE[position % len(CYCLE)],
                label=f"seed {seed}",
            )
            for position, seed in enumerate(seeds)
        ),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, prop=font(9))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
