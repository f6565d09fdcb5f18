"""Command: ``python -m dnas_ens.distil R``: one network that says what the ensemble says, for a member's cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from tyro.conf import Positional

from dnas_ens.commands.options import data_of_run, print_next, resumable
from dnas_ens.commands.parse import parse
from dnas_ens.config import require

PROG = "python -m dnas_ens.distil"


@dataclass(frozen=True, kw_only=True)
class DistilCommand:
    """Options of the command."""

    run_dir: Positional[Path]
    """Run folder whose members are trained."""
    member: int | None = None
    """Which member's cells and recipe the network has, from 0; default: that of the best one on val."""
    epochs: int | None = None
    """Epochs; default: those of the longest member, with those of the networks it goes on from."""
    data: str | None = None
    """Where the images of the run are now, if they have moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Go on with an interrupted training."""


def main(argv: list[str]) -> None:
    """Run the command."""
    command = parse(
        DistilCommand,
        argv,
        prog=PROG,
        description="Train one network of a member's size on what the ensemble says of the augmented training images. "
        "It goes to R/distilled, which predict and export take like any ensemble; evaluate R measures it beside the "
        "members and the ensemble.",
    )
    from dnas_ens.config import RetrainConfig
    from dnas_ens.config.fields import override
    from dnas_ens.ensembles import Ensemble
    from dnas_ens.ensembles.storage import MANIFEST, trained_folders
    from dnas_ens.metrics.calibration import fit_temperature
    from dnas_ens.metrics.scores import nll
    from dnas_ens.run.files import sha256
    from dnas_ens.run.folder import RunFolder
    from dnas_ens.run.machine import resolve_device
    from dnas_ens.space.genotype import Genotype
    from dnas_ens.training.distillation import StudentTraining
    from dnas_ens.training.members import ensemble_of, trained_network

    device, typed = resolve_device(command.device), [*PROG.split(), *argv]
    with RunFolder.open(command.run_dir, command=typed) as run, resumable(run, typed):
        teacher = Ensemble.load(run.path)
        notes = [_note(place) for place in trained_folders(run.path)[0]]
        lines = [_line(run.path, note) for note in notes]
        chosen = command.member
        if chosen is None:
            chosen = min(range(len(notes)), key=lambda index: float(notes[index]["val_nll"]))
        require(
            0 <= chosen < len(notes),
            f"Member {chosen} was asked for, but there are {len(notes)}.",
            f"Give --member 0 to {len(notes) - 1}.",
        )
        note = notes[chosen]
        # A cycle, or a network that was trained longer, has the rate and the epochs of its last part alone.
        recipe = override(RetrainConfig(), lines[chosen][-1]["recipe"]).of_base()
        epochs = max(sum(each["epochs"] for each in line) for line in lines)
        if command.epochs is not None:
            epochs = command.epochs
        place = run.path / "distilled"
        require(
            command.resume or not (place / "members").exists(),
            f"{place} holds a network already.",
            "Go on with it by --resume, or remove the folder.",
        )
        data = data_of_run(run, moved_to=command.data)
        run.write_env({"device": str(device), "data": data.describe()})
        training = StudentTraining(
            Genotype.from_dict(note["spec"]["genotype"]),
            data,
            replace(recipe, epochs=epochs),
            teacher=teacher,
            teacher_is=sha256(run.path / MANIFEST),
            index=int(note["index"]),
            device=device,
        )
        network = trained_network(training, folder=place)
        probs, labels = training.val_probs(), data.val.labels.cpu().numpy()
        student = ensemble_of([network], temperature=fit_temperature(probs, labels), data=data)
        student.save(place, overwrite=True, numbers=[training.index])
        of_teacher, _ = teacher.averaged(teacher.predict_probs(data.val, device=device))
        print(
            f"NLL on val: the ensemble of {teacher.num_members} {nll(of_teacher, labels):.4f}, member {chosen} "
            f"{float(note['val_nll']):.4f}, the network distilled from the ensemble {nll(probs, labels):.4f}"
        )
        print(f"distilled: {place}")
        print_next(run.path, "dnas_ens.evaluate")


def _note(place: Path) -> dict[str, Any]:
    """Read the member.json of a member's folder."""
    from dnas_ens.run.files import read_checked

    form = {
        "index": int,
        "epochs": int,
        "val_nll": (float, int),
        "recipe": dict,
        "spec": {"genotype": dict},
        "parent?": (int, NoneType),
    }
    found: dict[str, Any] = read_checked(place / "member.json", form)
    return found


def _line(folder: Path, note: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the notes of a network and of those it goes on from, the one of fresh weights last."""
    line = [note]
    # A damaged file could lead round in a circle; networks go on from earlier ones alone.
    while (parent := line[-1].get("parent")) is not None and 0 <= parent < line[-1]["index"]:
        line.append(_note(folder / "members" / str(parent)))
    return line
