"""Command: ``python -m dnas_ens.export R --output FILE``: a trained ensemble as one file for other software."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from dnas_ens.commands.parse import parse
from dnas_ens.config import require

if TYPE_CHECKING:
    from torch import Tensor

    from dnas_ens.ensembles import Ensemble

PROG = "python -m dnas_ens.export"
#: Pictures on which the file is compared with the ensemble.
NUM_COMPARED = 64


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Options of the command."""

    folder: Positional[Path]
    """Run folder whose members are trained, or a folder an ensemble was saved in."""
    images: Positional[tuple[Path, ...]] = ()
    """Pictures to compare the file on, and folders of them; default: images of the run's val."""
    output: Annotated[Path, arg(aliases=("-o",))]
    """The file, .pt2 or .onnx."""
    format: Literal["torch", "onnx"] | None = None
    """torch (torch.export) or onnx; default: by the ending of the output."""
    data: str | None = None
    """Where the images of the run are now, if they have moved."""


def main(argv: list[str]) -> None:
    """Run the command."""
    command = parse(
        ExportCommand,
        argv,
        prog=PROG,
        description="Export an ensemble as one graph: uint8 pictures (B, H, W, C) in, probabilities out, of the "
        "average (B, K) and of each member (M, B, K). It is compared with the ensemble before it is kept. ONNX "
        "needs: pip install 'dnas_ens[onnx]'.",
    )
    from dnas_ens.ensembles import Ensemble
    from dnas_ens.ensembles.exporting import export, format_of

    # Before members and images are read, which may take long.
    chosen = command.format or format_of(command.output)
    ensemble = Ensemble.load(command.folder)
    images = compared_images(command, ensemble)
    difference = export(ensemble, command.output, images, format=chosen)
    size = command.output.stat().st_size / 2**20
    print(
        f"wrote {command.output}: {ensemble.num_members} members, {size:.1f} MiB; probabilities of {len(images)} "
        f"pictures within {difference:.1g} of the ensemble's"
    )


def compared_images(command: ExportCommand, ensemble: Ensemble) -> Tensor:
    """Return uint8 images (N, C, H, W) to compare on: those given, else some of the run's val."""
    import torch

    from dnas_ens.commands.options import data_of_run
    from dnas_ens.commands.predict import image_files
    from dnas_ens.run.folder import RunFolder

    wanted = ensemble.preprocessing
    if command.images and wanted is not None:
        files = image_files(command.images)[:NUM_COMPARED]
        require(len(files) > 1, f"{files[0]} is the only picture.", "Give two or more to compare the file on.")
        return torch.stack([wanted.read(path) for path in files])
    # What was distilled lies in its teacher's run.
    own = [command.folder, *([command.folder.absolute().parent] if command.folder.name == "distilled" else [])]
    runs = [folder for folder in own if (folder / "config.json").exists()]
    require(
        bool(runs),
        f"{command.folder} is no run folder, so there are no images to compare the file on.",
        "Name some pictures after it.",
    )
    with RunFolder.open(runs[0], command=[*PROG.split(), str(command.folder)]) as run:
        data = data_of_run(run, moved_to=command.data)
        return (data.val.images if data.pictures is None else data.pictures)[:NUM_COMPARED]
