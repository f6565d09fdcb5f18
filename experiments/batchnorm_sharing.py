"""What does sharing BatchNorm statistics between the slices of one pass do to a search?

    OMP_NUM_THREADS=1 python experiments/batchnorm_sharing.py --workers 2

The search evaluates its m drawn members on m slices of a batch in one pass (``--passes slices``), and BatchNorm
normalises all of them with statistics of the whole batch, a mixture over m architectures. ``--passes separate`` is the
exact way: m passes, each with statistics of its own member, taken over a slice alone (16 of 64 images in the presets).
For every seed one search of each from the same initial weights, images and draws, and then: how lambda steers (as in
diversity_control.py), whether val NLL with inherited weights ranks genotypes as val NLL after training from scratch
does (Kendall's tau, over random genotypes that both searches share and over those together with candidates of
the search), relaxed accuracy, discretisation gap and seconds. Test images are never read. Within the pool random
genotypes and candidates are two groups, which the supernet has trained unequally; so tau is given within each as well.

Cost with ``--data digits`` and a pool of 16: on one core about 45 s and 95 s for the two searches of a seed and 9 to
14 s for each of its 24 trainings, 20 minutes for three seeds. With ``--data fashion-mnist`` (preset micro) hours;
``--limit-train 5000 --candidate-recipe-epochs 4`` makes it two.
Finished searches with their scores, and finished trainings, are kept in OUTPUT.jsonl and not run again, so that an
interrupted study goes on and more seeds add to it; an interrupted search begins anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from studies.batchnorm_sharing.options import Study
from studies.batchnorm_sharing.records import Records
from studies.batchnorm_sharing.report import report

from dnas_ens.commands.parse import parse, run_main

PROG = "python experiments/batchnorm_sharing.py"


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    from dnas_ens.training.workers import completed, worker_pool

    records = Records(study)
    records.file.parent.mkdir(parents=True, exist_ok=True)
    command = [*PROG.split(), *argv]
    with worker_pool(study.workers) as pool:

        def run(tasks: Sequence[Callable[[], dict[str, Any]]]) -> None:
            for record in completed(pool, tasks):
                records.add(record)
                name = f"search, {record['setting']}" if record["kind"] == "search" else "training"
                print(f"seed {record['seed']}, {name}: {record['cpu_seconds']:.1f} s", flush=True)

        # Seed by seed, so that an interrupted study has both settings.
        for seed in range(study.seeds):
            drawn = study.random_pool(seed)
            run([*records.missing_searches(seed), *records.missing_trainings(drawn, seed)])
            run([*records.missing_trainings(records.found(seed), seed)])
            text = report(records, command)
    print(text)
    print(f"wrote {study.path}.md, .png and .jsonl")


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
