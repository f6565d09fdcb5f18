r"""Are members of different genotypes further apart in function space than members of different seeds?

    OMP_NUM_THREADS=1 python experiments/loss_landscape.py --run-dir runs/001-digits
    OMP_NUM_THREADS=1 python experiments/loss_landscape.py
    OMP_NUM_THREADS=1 python experiments/loss_landscape.py --data fashion-mnist --limit-train 10000 --epochs 10 \
        --models small-cnn
    python experiments/loss_landscape.py --data cifar10 --models small-cnn medium-cnn resnet20v1 --epochs 40

The loss landscape study of Fort, Hu and Lakshminarayanan (arXiv 1912.02757), with cells beside its networks: S
solutions of every architecture from seeds of their own, with checkpoints along each trajectory; cosine of weights and
disagreement of predictions within a trajectory, across seeds and across architectures, t-SNE of trajectories, the
diversity-accuracy plane, losses along lines, ensembles of every size; and pairs of seeds against pairs of genotypes,
judged by a permutation of members. Published, on CIFAR-10 with SmallCNN (64 % accuracy), MediumCNN (71 %) and
ResNet20v1: seeds explore different modes, far apart in weights and predictions, more diverse at their accuracy than
what surrounds one solution; a trajectory stays in one mode and adds little to an ensemble. These are figures without
tables, so they are compared in words. The question about genotypes has no published counterpart there.

Matrices, t-SNE, plane and lines are of val; nothing is chosen but temperatures, on val; the solutions then predict test
once. Cost on one CPU core: the first and the third command about 3 minutes each (15 cells on digits), the second, with
random cells, 5; the last waits for a GPU. Finished solutions are kept in the study's folder and not trained again.
Results: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from dnas_ens.commands.parse import parse, peek
from dnas_ens.compare.study import RESULTS, run_script, write_study
from dnas_ens.config import RetrainConfig, require
from dnas_ens.config.fields import to_dict
from dnas_ens.errors import UserError

if TYPE_CHECKING:
    from studies.loss_landscape.solutions import Architecture

    from dnas_ens.data.dataset import ImageData
    from dnas_ens.run.folder import RunFolder

PROG = "python experiments/loss_landscape.py"
CELLS = "cells"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    recipe: OmitArgPrefixes[RetrainConfig] = field(
        default_factory=lambda: RetrainConfig(average_last=0.0, weight_decay=3e-4)
    )
    """How every solution is trained."""
    models: tuple[str, ...] = (CELLS,)
    """small-cnn, medium-cnn, resnet20v1 or any other reference model, and cells. The first is the one whose weights
    are compared."""
    run_dir: Path | None = None
    """Finished search whose members are the cells, with its data and recipe; default: random cells."""
    genotypes: int = 5
    """Different genotypes among the cells, at most."""
    seeds: int = 3
    """S, solutions of every architecture."""
    checkpoints: int = 10
    """Checkpoints along a trajectory, after the one before training."""
    data: str = "digits"
    """digits, fashion-mnist, mnist, cifar10, cifar100, svhn, or a path to a folder of images."""
    data_root: Path | None = None
    """Where named data sets are kept; default: $DNAS_ENS_DATA, else ~/.cache/dnas_ens/data."""
    limit_train: int | None = None
    """Training images, a stratified subset; default: all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    folder: Path | None = None
    """Where solutions are kept; default: runs/loss-landscape-DATA-MODELS."""
    output: Path | None = None
    """Where the results go: OUTPUT.md, .png, .jsonl; default: runs/results/loss-landscape-DATA-MODELS."""

    def __post_init__(self) -> None:
        require(self.seeds >= 2, f"--seeds is {self.seeds}.", "Give --seeds 2 or more, to have pairs.")
        require(
            not (self.recipe.average_last or self.recipe.cycles),
            "A solution is where one cosine ends, but the recipe averages weights or has cycles.",
            "Give --average-last 0 and --cycles 0.",
        )
        require(self.genotypes >= 1, f"--genotypes is {self.genotypes}.", "Give --genotypes 1 or more.")
        require(
            2 <= self.checkpoints <= self.recipe.epochs,
            f"--checkpoints {self.checkpoints} do not fit {self.recipe.epochs} epochs.",
            "Give --checkpoints from 2 to --epochs.",
        )
        require(
            len(set(self.models)) == len(self.models) > 0,
            f"--models are {', '.join(self.models) or 'none'}.",
            "Name one or more models, each once.",
        )

    @property
    def name(self) -> str:
        """Name of the study's folder and results."""
        cells = "searched-cells" if self.run_dir else "random-cells"
        models = "-".join(cells if model == CELLS else model for model in self.models)
        return f"loss-landscape-{Path(self.data).name}-{models}"


@dataclass(frozen=True)
class EarlyOptions:
    """Options that are read first, because they decide the defaults of the others."""

    run_dir: Path | None = None


def read_options(argv: list[str]) -> Study:
    """Parse the command line; a search's run folder gives data and recipe."""
    from dnas_ens.config.fields import override
    from dnas_ens.config.presets import retrain_preset
    from dnas_ens.run.files import read_json

    run_dir = peek(EarlyOptions, argv, prog=PROG).run_dir
    default = Study()
    if run_dir is not None and not {"-h", "--help"} & set(argv):
        file = Path(run_dir) / "config.json"
        config = read_json(file) if file.exists() else {}
        require(
            "search" in config,
            f"{run_dir} is not the run folder of a search.",
            "Name one that a search made.",
        )
        data = config["search"]["data"]
        # As retrain would train them, if it has not yet.
        space = config["search"]["supernet"]["space"]
        recipe = override(retrain_preset(config["search"]["preset"], space), config.get("retrain", {}))
        stem_stride = recipe.stem_stride or config["search"]["supernet"].get("stem_stride")
        # A solution is where SGD ends, not an average.
        recipe = replace(recipe, stem_stride=stem_stride, average_last=0.0)
        default = replace(
            default,
            recipe=recipe,
            checkpoints=min(default.checkpoints, recipe.epochs),
            data=data["data"],
            limit_train=data["limit_train"],
        )
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=default)
    require(
        study.run_dir is None or (study.data, study.limit_train) == (default.data, default.limit_train),
        "A search's members are compared on its own data.",
        "Leave out --data and --limit-train, or --run-dir.",
    )
    return study


def load(study: Study) -> tuple[ImageData, list[Architecture]]:
    """Return the data and the architectures."""
    from studies.loss_landscape.solutions import Architecture

    from dnas_ens.baselines import random_pool
    from dnas_ens.commands.options import data_of_run
    from dnas_ens.data import load_data
    from dnas_ens.run.folder import RunFolder
    from dnas_ens.space.genotype import ranked_genotypes
    from dnas_ens.space.search_space import SearchSpace
    from dnas_ens.space.spaces import DARTS_OPERATIONS

    if study.run_dir is None:
        data = load_data(study.data, data_root=study.data_root, limit_train=study.limit_train)
        space = SearchSpace.for_stack(study.recipe.num_cells, operations=DARTS_OPERATIONS, num_nodes=4)
        count = study.genotypes if CELLS in study.models else 1
        genotypes = random_pool(space, count, seed=study.recipe.seed)
    else:
        with RunFolder.open(study.run_dir) as run:
            data, found = data_of_run(run), run.read_json("genotypes.json")
        members = ranked_genotypes(found)
        # The same cell twice would be a seed, not a genotype.
        different = {genotype.canonical(): genotype for genotype in reversed(members)}
        genotypes = list(reversed(different.values()))[: study.genotypes]
    cells = [Architecture(name=f"cell {index}", genotype=each) for index, each in enumerate(genotypes)]
    return data, [each for model in study.models for each in (cells if model == CELLS else [Architecture(name=model)])]


def settings(study: Study, data: ImageData, architectures: list[Architecture]) -> dict[str, Any]:
    """Return what decides the solutions, for config.json."""
    return {
        "recipe": to_dict(study.recipe),
        "data": data.fingerprint,
        "architectures": [
            {"name": each.name, "genotype": each.genotype.to_dict() if each.genotype else None}
            for each in architectures
        ],
        "seeds": study.seeds,
        "checkpoints": study.checkpoints,
    }


def open_folder(study: Study, config: dict[str, Any], command: list[str]) -> RunFolder:
    """Make the folder of the solutions, or continue with it."""
    from dnas_ens.run.folder import RunFolder

    folder = study.folder or Path("runs") / study.name
    try:
        return RunFolder.create(folder, config=config, section="loss-landscape", command=command, resume=True)
    except UserError as error:
        # Here --run-dir names the search.
        raise UserError(error.cause, error.remedy.replace("--run-dir", "--folder")) from error


def main(argv: list[str]) -> None:
    """Run the study."""
    study = read_options(argv)
    from studies.loss_landscape.figures import draw
    from studies.loss_landscape.measures import Found, evaluate, measure_landscape, records
    from studies.loss_landscape.report import report
    from studies.loss_landscape.solutions import Bench

    from dnas_ens.run.machine import resolve_device

    device = resolve_device(study.device)
    data, architectures = load(study)
    bench = Bench(
        data=data.to(device),
        recipe=study.recipe,
        architectures=architectures,
        seeds=study.seeds,
        checkpoints=study.checkpoints,
        device=device,
    )
    command = [*PROG.split(), *argv]
    with open_folder(study, settings(study, data, architectures), command) as run:
        run.write_env({"device": str(device), "data": data.describe()})
        solutions = bench.solve(run.path)
        landscape = measure_landscape(bench, solutions)
        predictions, late = evaluate(bench, solutions, run.path)
        found = Found(bench, solutions, landscape, predictions, late)
        write_study(
            study.output or RESULTS / study.name,
            report(found, run.read_json("env.json")[-1]),
            figure=lambda path: draw(found, path),
            records=records(found),
        )


if __name__ == "__main__":
    run_script(main)
