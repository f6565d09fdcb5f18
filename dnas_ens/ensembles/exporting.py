"""An ensemble as one file that other software runs: pictures in, probabilities out, nothing of ours needed.

Legend: B pictures, M members, K classes, H x W pixels, C channels.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dnas_ens.data.batches import normalise
from dnas_ens.ensembles.preprocessing import GIVE_PREPROCESSING
from dnas_ens.errors import UserError
from dnas_ens.run.files import write_atomic
from dnas_ens.training.prediction import evaluation_mode

if TYPE_CHECKING:
    from dnas_ens.ensembles.ensemble import Ensemble

Format = Literal["torch", "onnx"]
#: Names of the graph's input and of its two outputs.
INPUT, OUTPUTS = "pictures", ("probabilities", "member_probabilities")
#: Largest difference of a probability from ours with which a file is kept.
TOLERANCE = 1e-4


class ExportedGraph(nn.Module):
    """What is exported: uint8 pictures (B, H, W, C) -> probabilities (B, K) and those of the members (M, B, K).

    Normalisation, combining weights and temperature are inside; cropping and resizing to H x W are not.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        assert ensemble.preprocessing is not None
        self.ensemble, self.preprocessing = ensemble, ensemble.preprocessing
        # Registered, so that its weights become the graph's.
        self.trunk = ensemble.preprocessing.trunk

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Classify pictures."""
        images = pictures.permute(0, 3, 1, 2)
        if self.trunk is not None:
            images = self.trunk(images)
        members = self.ensemble.member_probs(
            normalise(images, mean=self.preprocessing.mean, std=self.preprocessing.std)
        )
        return self.ensemble.combine(members), members


def export(
    ensemble: Ensemble,
    path: str | os.PathLike[str],
    images: Tensor | npt.NDArray[np.uint8],
    *,
    format: Format | None = None,
) -> float:
    """Write an ensemble as one graph, after that graph has given the ensemble's own probabilities on real images.

    The file holds what `ExportedGraph` says, for any number of pictures, and the names of classes and the pictures'
    size as JSON: ``torch.export.load(path, extra_files=...)`` or the ONNX model's ``metadata_props``, key "card".

    Args:
        ensemble: With preprocessing; it is moved to the CPU.
        images: At least two real images, uint8 (N, C, H, W), on which both are compared.
        format: "torch" (`torch.export`, .pt2) or "onnx"; None tells it by the ending of the path.

    Returns:
        The largest difference between a probability of the file's and of the ensemble's.

    Raises:
        UserError: No preprocessing, another ending or format, too few images, packages that are missing, members that
            do not become one graph, or a graph that says something else than the ensemble.
    """
    path = Path(path)
    format = format or format_of(path)
    if format not in get_args(Format):
        raise UserError(f"format is {format!r}.", 'Give "torch", "onnx", or None to tell it by the ending of the path.')
    if ensemble.preprocessing is None:
        raise UserError("The ensemble does not know how its members want images.", GIVE_PREPROCESSING)
    given = torch.as_tensor(images)
    # A batch of one would be taken for a constant of the graph.
    if given.dtype != torch.uint8 or given.ndim != 4 or len(given) < 2:
        raise UserError(
            f"Images {tuple(given.shape)} of type {given.dtype} were given to compare on.",
            "Give two or more uint8 images (N, C, H, W).",
        )
    # By the ensemble's own way, so that a fault of the graph's preprocessing shows too.
    members = torch.from_numpy(ensemble.predict_probs(given, device="cpu"))
    wanted = ensemble.combine(members), members
    pictures = given.cpu().permute(0, 2, 3, 1).contiguous()
    graph = ExportedGraph(ensemble)
    with evaluation_mode(graph), torch.no_grad():
        # Another number of pictures than is compared on.
        program = _traced(graph, pictures[: max(2, len(pictures) // 2)])
    card = {
        "classes": None if ensemble.classes is None else list(ensemble.classes),
        "members": ensemble.num_members,
        "temperature": float(ensemble.temperature),
        "input": f"{INPUT}: uint8 (B, {', '.join(map(str, pictures.shape[1:]))})",
        "outputs": "probabilities: (B, K); member_probabilities: (M, B, K)",
        **ensemble.preprocessing.to_dict(),
    }
    content, found = (_torch_file if format == "torch" else _onnx_file)(program, json.dumps(card), pictures)
    differences = [abs(ours.numpy() - theirs).max() for ours, theirs in zip(wanted, found, strict=True)]
    difference = float(max(differences))
    # Not the other way round, for NaN compares as false.
    if not difference <= TOLERANCE:
        raise UserError(
            f"The exported graph differs from the ensemble by up to {difference:.2g} in a probability.",
            "Nothing was written; try the other format, and tell the authors.",
        )
    write_atomic(path, content)
    return difference


def format_of(path: Path) -> Format:
    """Tell the format by a file's ending.

    Raises:
        UserError: It is neither .pt2 nor .onnx.
    """
    formats: dict[str, Format] = {".pt2": "torch", ".onnx": "onnx"}
    if path.suffix not in formats:
        raise UserError(f"{path} ends neither in .pt2 nor in .onnx.", "Name the file so, or give --format.")
    return formats[path.suffix]


def _traced(graph: ExportedGraph, pictures: Tensor) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim("batch", min=1)},)
    try:
        return torch.export.export(graph, (pictures,), dynamic_shapes=batch)
    except Exception as error:  # the tracer and a member's own forward may raise anything
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"The members do not become one graph: {cause}.",
            "A member whose forward branches on its input cannot be exported.",
        ) from error


def _torch_file(
    program: torch.export.ExportedProgram, card: str, pictures: Tensor
) -> tuple[bytes, list[npt.NDArray[Any]]]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"card": card})
    file.seek(0)
    with torch.no_grad():
        found = torch.export.load(file).module()(pictures)
    return file.getvalue(), [output.numpy() for output in found]


def _onnx_file(
    program: torch.export.ExportedProgram, card: str, pictures: Tensor
) -> tuple[bytes, list[npt.NDArray[Any]]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (the exporter needs it)
    except ImportError as error:
        raise UserError(
            f"ONNX needs a package that is not installed: {error.name}.", "pip install 'dnas_ens[onnx]'"
        ) from error
    with warnings.catch_warnings():
        # torch.export says so of its own graph while it copies it; the file is compared below.
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        exported = torch.onnx.export(
            program, input_names=[INPUT], output_names=list(OUTPUTS), dynamo=True, verbose=False
        )
    assert exported is not None
    exported.model.metadata_props["card"] = card
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found: list[npt.NDArray[Any]] = session.run(list(OUTPUTS), {INPUT: pictures.numpy()})
    return content, found
