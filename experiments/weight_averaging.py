"""What are averages of the weights of one training's last models worth, and over how many models?

    OMP_NUM_THREADS=1 python experiments/weight_averaging.py --data blobs --seeds 10
    OMP_NUM_THREADS=1 python experiments/weight_averaging.py --data digits --seeds 5

One training keeps the models after each of its last epochs. The study draws the whole curve over i: model i from the
end alone, the equal, linearly and exponentially decaying averages of the last i models, and the average of their
predictions. Beside them Polyak's average, SWA (arXiv 1803.05407), an EMA, and uniform and greedy soups (arXiv
2203.05482) of branches: the training is taken up once more from where the kept models begin, with another order and
augmentation. Everything is run under a learning rate that is constant over the kept epochs, as averaging wants it, and
under the usual cosine to 0, because an average may only undo that a constant rate never settles. On blobs the MLP,
on images a network of our cells and small-cnn (``--model`` chooses).

n, the best single model, greedy soups and temperatures are chosen on val; each row is then evaluated on test once.
There is no published table of this study. The literature expects: SWA generalises better than the end of a
conventional training, at a constant or cyclic rate (1803.05407); soups of models that were fine-tuned from one
pre-trained network are better than their best ingredient at the cost of one (2203.05482).

Cost on one core: blobs with ten seeds less than a minute, digits with five seeds six to seven minutes. Trainings, their
kept models and their predictions are kept in the run folder and not made again, so that an interrupted study continues
from the training that was interrupted, and more seeds add to it. Results: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl.
"""

from __future__ import annotations

import functools

from studies.weight_averaging.report import groups_of, plot, report
from studies.weight_averaging.study import Study, Task, build_model, load_problem
from studies.weight_averaging.trainings import EQUAL, LAST, evaluate, train

from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.study import run_missing, run_script, write_study
from dnas_ens.config import require
from dnas_ens.run.files import with_ending

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
        # An impossible model is refused before another one is trained.
        build_model(study, problem, model)

    def settings(record: Record) -> Record:
        return {"settings": study.settings(Task.of(record), problem.fingerprint)}

    def store(name: str, file: str) -> Records:
        return Records(
            study.folder / name,
            key=Task._fields,
            settings=settings,
            arrays=lambda record: study.place(record) / file,
            option="run-dir",
        )

    trained, evaluated = store("trainings.jsonl", "averages"), store("records.jsonl", "predictions.npz")
    results = with_ending(study.results, ".jsonl")
    for record in Records(results, key=Task._fields, settings=settings):
        task = Task.of(record)
        require(
            task in evaluated or task in study.tasks(),
            f"{results} holds {task}, which is not in {study.folder}.",
            "Give the --run-dir it was trained in, or another --output.",
        )
    env = environment([*PROG.split(), *argv])
    environments = study.folder / "env.json"
    write_json(environments, [*(read_json(environments) if environments.exists() else []), env])

    def seconds(record: Record) -> str:
        spent = record["training_cpu_seconds"] + record["branches_cpu_seconds"]
        return f"{Task.of(record)}: trained, {spent:.1f} CPU s"

    def losses(record: Record) -> str:
        last, equal = (record["rows"][name] for name in (LAST, EQUAL))
        return (
            f"{Task.of(record)}: evaluated, calibrated NLL of the last model {last['calibrated_nll']:.4f}, of the "
            f"equal average of {equal['num_averaged']} {equal['calibrated_nll']:.4f}"
        )

    for task in study.tasks():
        run_missing(trained, {task: functools.partial(train, study, problem, task)}, said=seconds)
        choose = functools.partial(evaluate, study, problem, task, trained[task])
        run_missing(evaluated, {task: choose}, said=losses)
    groups = groups_of(study, evaluated)
    header, text = report(study, problem, groups, env)
    write_study(
        study.results,
        header + text,
        figure=lambda path: plot(groups, path),
        records=[evaluated[task] for task in sorted(map(Task.of, evaluated))],
        shown=text,
    )


if __name__ == "__main__":
    run_script(main)
