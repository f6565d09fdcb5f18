"""Can one network, found between the weights of several, replace the mean of their predictions?

    OMP_NUM_THREADS=1 python experiments/parameter_evolution.py --data digits --model wrn-10-1 --epochs 60
    python experiments/parameter_evolution.py --device cuda

Differential evolution (scipy) looks for e in w = e w_o + (1 - e) w_p of two networks, and for a point of the simplex
over k networks, beside the best single network and the mean of the same networks' predictions. Two kinds of networks:

- *independent*: trained from seeds of their own. Between them lies a barrier of loss (arXiv 1912.05671).
- *snapshots*: the first independent network, trained on by the cycles of fast geometric ensembling (arXiv 1802.10026),
  leaves a snapshot in the middle of each. They stay in one valley, so that a straight line connects them.

Published elsewhere (without data, network and recipe): networks 63.23 % and 63.42 %, evolved 63.35 %, averaged
predictions 64.92 %. Half of val judges the candidates and chooses the best single network, the whole of it fits every
temperature (the other half alone may hold no error, and a temperature then says nothing); test is predicted after that.
Cost of the first command: about two minutes of one core for three seeds; of the second hours on one GPU. Finished
trainings, and every candidate that was evaluated, lie in the run folder and are not run again. Results: OUTPUT.md,
OUTPUT.png (accuracy and NLL over e), OUTPUT.jsonl.
"""

from __future__ import annotations

import sys

from studies.bench import Bench
from studies.parameter_evolution.evolving import KINDS, Study, measure
from studies.parameter_evolution.report import found_sentences, plot, published_table
from studies.records import open_run, run_seeds
from studies.report import comparisons, table, write_report

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.run.files import with_ending

PROG = "python experiments/parameter_evolution.py"
STUDY = "parameter-evolution"


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    bench = Bench.of(study)
    with open_run(STUDY, study, bench, [*PROG.split(), *argv]) as run:
        records = run_seeds(run, study, lambda folder, seed: measure(study, bench, folder, seed))
        count = study.networks
        pairs = [
            (f"{kind}: {first}", f"{kind}: {second}")
            for kind in KINDS
            for first, second in (
                ("evolved, two networks", "best single network"),
                ("evolved, two networks", "mean of predictions, two"),
                (f"evolved, simplex of {count}", "best single network"),
                (f"evolved, simplex of {count}", f"mean of predictions, {count}"),
            )
        ]
        body = (
            f"*Independent*: {count} networks of {study.epochs} epochs, one cosine each. *Snapshots*: the first of "
            f"them trained on for {count} triangular cycles of {study.cycle_epochs} epochs (learning rate "
            f"{study.cycle_learning_rate:g} to {study.cycle_learning_rate / 100:g}), a snapshot in the middle of "
            "each. Two networks: the first two independent, the first and the last snapshot. Differential evolution "
            f"by {study.criterion}: {study.population} candidates, up to {study.generations} generations more; every "
            "candidate, and every network alone, gets BatchNorm statistics of its own from training images as they "
            "are. Half of val judged the candidates and chose the best single network (by NLL); temperatures were "
            "fitted on the whole of val, so that the judging half is used twice, for at most "
            f"{count - 1} coefficients of a network. (On digits they were first fitted on the other half alone, which "
            "holds no error of some networks, so that temperatures went to their bound; that was changed after test "
            "had been seen.) Mean ± standard deviation over seeds on test; NLL "
            "in nats. CPU "
            "seconds: trainings that a row needs, and the evolution.\n\n"
            f"{table(records)}\n## Beside the published table\n\nPublished without data, "
            f"network and recipe: compare the order of the rows, not the figures.\n\n{published_table(records)}\n"
            f"## What was found on val\n\n{found_sentences(study, records)}\n"
            f"## Comparisons\n\n{comparisons(run, records, pairs)}"
        )
        plot(records, with_ending(study.path(STUDY), ".png"))
        write_report(
            STUDY,
            run,
            bench,
            records,
            title="Evolution between the weights of networks",
            body=body,
            waiting="The published figures come without data, network and recipe, so that only the order of rows "
            "can be compared. The full scale, WRN-16-4 on CIFAR-10 for 200 epochs, waits for a GPU: "
            f"`{PROG} --device cuda`",
        )


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
