"""The studies of EdgeNES: accuracy along lambda, ensembles up to a limit, warm-up, deviations, and search curves.

    OMP_NUM_THREADS=1 python experiments/diversity_sweep.py

Two ways of steering, each searched with its schedules, with constant ones and without warm-up epochs: *star*
(js-pairwise, learnt base; lambda is a distance to it) and *hypernet* (EdgeNES's edge-overlap, base from an earlier
search; lambda counts the edges shared with it). Networks get the weights of the supernet or are trained from scratch.
    a. accuracy and shared edges against lambda along the paths
       (published: Fashion-MNIST, one cell, 92.10 % at lambda = 0, 86.4 to 90.6 % for lambda >= 5)
    b. ensembles of members with lambda up to a limit Lambda, chosen greedily on val (published: CIFAR-100, one cell
       searched, two stacked: DARTS 46.8, DartsEns 48.2, Random-NES 46.9, RandomD-NES 47.7, EdgeNES 48.1 %)
    c. schedules and warm-up epochs on and off (published, EdgeNES's Table 3: 62.4 with and 57.7 % without)
    d. samples of the search against random deviations that share as many edges with the base (published: EdgeNES
       48.1 and RandomD-NES 47.7 %)
    e. the ensemble with inherited weights against search epochs, the area under the curve tested over seeds

Cost with ``--data digits``: on one core about 3 minutes a seed, 7 searches of one cell of about 15 s and some 30
trainings of about 2 s. Estimated, not run: hours with ``--data fashion-mnist`` (preset micro, 10,000 images), and four
to five times as long in the space of the project's other studies, ``--cells 3`` with ``--edges-per-node 2``.
Finished searches and trainings are kept, a line each in OUTPUT.jsonl and their predictions in the run folder, and not
run again, so that an interrupted study continues and more seeds add to it; an interrupted search restarts. Tables and
plot are written at the end; for fewer seeds give ``--seeds``.
"""

from __future__ import annotations

import functools

from studies.diversity_sweep.searches import BASE_SETTING, Study, run_search, searches, trainings
from studies.diversity_sweep.tables import Figures, report
from studies.search_studies import run_units

from dnas_ens.commands.parse import parse
from dnas_ens.compare.study import run_script, write_study

PROG = "python experiments/diversity_sweep.py"


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    from studies.diversity_sweep.figure import plot

    from dnas_ens.run.machine import environment
    from dnas_ens.training.workers import worker_pool

    records = study.records()
    with worker_pool(study.workers, engine=study.engine) as pool:
        run = functools.partial(run_units, records, pool=pool)
        # Seed by seed, so that an interrupted study has all settings.
        for seed in range(study.seeds):
            base = functools.partial(run_search, study, BASE_SETTING, seed, None)
            run({("search", BASE_SETTING, seed): base})
            run(searches(study, records, seed))
            run(trainings(study, records, seed))
    figures = Figures(study, records, range(study.seeds))
    header, text = report(figures, environment([*PROG.split(), *argv]))
    write_study(study.path, header + text, figure=lambda path: plot(figures, path), shown=text)


if __name__ == "__main__":
    run_script(main)
