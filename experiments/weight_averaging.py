"""What are averages of the weights of one training's last models worth, and over how many models?

    OMP_NUM_THREADS=1 python experiments/weight_averaging.py --data blobs --seeds 10
    OMP_NUM_THREADS=1 python experiments/weight_averaging.py --data digits --seeds 5

One training keeps the models after each of its last epochs. The study draws the whole curve over i: model i from the
end alone, the equal, linearly and exponentially decaying averages of the last i models, and the average of their
predictions. Beside them Polyak's average, SWA (arXiv 1803.05407), an EMA, and uniform and greedy soups (arXiv
2203.05482) of branches: the training is taken up once more from where the kept models begin, with another order and
augmentation. Everything is run under a learning rate that is constant over the kept epochs, as averaging wants it, and
under the usual cosine to 0, for an average may also merely undo that a constant rate never settles. On blobs the MLP,
on images a network of our cells and small-cnn (``--model`` chooses).

n, the best single model, greedy soups and temperatures are chosen on val; each row is then evaluated on test once.
There is no published table of this study. The literature expects: SWA generalises better than the end of a
conventional training, at a constant or cyclic rate (1803.05407); soups of models that were fine-tuned from one
pre-trained network are better than their best ingredient at the cost of one (2203.05482).

Cost on one core: blobs with ten seeds less than a minute, digits with five seeds six to seven minutes. Trainings, their
kept models and their predictions lie in the run folder and are not made again, so that an interrupted study goes on,
from the training that was interrupted, and more seeds add to it. Results: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl.
"""

from __future__ import annotations

import sys

from studies.weight_averaging.evaluation import evaluate
from studies.weight_averaging.methods import EQUAL, LAST
from studies.weight_averaging.options import Study
from studies.weight_averaging.problem import build_model, load_problem
from studies.weight_averaging.records import finished_records
from studies.weight_averaging.report import report
from studies.weight_averaging.trainings import train

from dnas_ens.commands.parse import parse, run_main

PROG = "python experiments/weight_averaging.py"


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    import torch

    from dnas_ens.run.files import read_json, write_json
    from dnas_ens.run.machine import environment

    torch.set_num_threads(1)
    problem = load_problem(study)
    for model in study.models:
        # A model that is not possible is refused before another one is trained.
        build_model(study, problem, model)
    finished_records(study, problem.fingerprint)
    command = [*PROG.split(), *argv]
    environments = study.folder / "env.json"
    sittings = read_json(environments) if environments.exists() else []
    write_json(environments, [*sittings, environment(command)])
    for task in study.tasks():
        place = study.folder / str(task)
        if not (place / "training.json").exists():
            train(study, problem, task, place)
            trained = read_json(place / "training.json")
            seconds = trained["training_cpu_seconds"] + trained["branches_cpu_seconds"]
            print(f"{task}: trained, {seconds:.1f} CPU s", flush=True)
        if not (place / "record.json").exists():
            evaluate(study, problem, task, place)
            rows = read_json(place / "record.json")["rows"]
            print(
                f"{task}: evaluated, calibrated NLL of the last model {rows[LAST]['calibrated_nll']:.4f}, of the "
                f"equal average of {rows[EQUAL]['num_averaged']} {rows[EQUAL]['calibrated_nll']:.4f}",
                flush=True,
            )
    print(report(study, problem, finished_records(study, problem.fingerprint), command))
    print(f"wrote {study.results}.md, .png and .jsonl")


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
