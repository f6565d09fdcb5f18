"""An ensemble's folder: ensemble.json, one safetensors file a member with its SHA-256, and a model card.

File names may not lead outside the folder, and a file other than the saved one is refused. A file holds the plain
module, whatever wraps it (torch.compile, DataParallel, a running average), and fills a wrapped or a plain one.
"""

from __future__ import annotations

import os
import reprlib
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dnas_ens.ensembles.card import CARD, EXTERNAL, model_card
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.nn.reference_models import ReferenceModel, model_from_spec
from dnas_ens.nn.reference_models.base import REFERENCE_KIND
from dnas_ens.run.files import load_tensors, read_json, save_tensors, sha256, sync_folder, write_atomic, write_json
from dnas_ens.training.prediction import Outputs

MANIFEST, TRUNK = "ensemble.json", "trunk.safetensors"
#: Ensembles that come with the package, by the names of their folders.
PRETRAINED = Path(__file__).parents[1] / "pretrained"


@dataclass(frozen=True, kw_only=True)
class StoredEnsemble:
    """What a folder holds of an ensemble: the arguments of `dnas_ens.ensembles.ensemble.Ensemble`."""

    members: Sequence[nn.Module]
    weights: Sequence[float] | None
    temperature: float
    classes: Sequence[str] | None
    preprocessing: Preprocessing | None
    outputs: Sequence[Outputs | None] | None


def write_ensemble(
    folder: Path,
    stored: StoredEnsemble,
    *,
    overwrite: bool,
    numbers: Sequence[int] | None = None,
    num_trained: int | None = None,
    notes: str | None = None,
) -> None:
    """Write ensemble.json, one safetensors file a member and the card; see `Ensemble.save`."""
    manifest = folder / MANIFEST
    if manifest.exists() and not overwrite:
        raise UserError(f"{folder} holds an ensemble already.", "Choose another folder, or save with overwrite=True.")
    entries, written = [], dict[Path, Path]()

    def beside(file: str) -> Path:
        """Where a file is written first: an earlier ensemble stays whole until all are there, if the disk is full."""
        path = folder / file
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        written[new] = path
        return new

    try:
        for index, member in zip(numbers or range(len(stored.members)), stored.members, strict=True):
            file = f"members/{index}/model.safetensors"
            state = {name: member.state_dict()[own] for own, name in _plain_names(member).items()}
            strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
            if strange:
                raise UserError(
                    f"Member {index} keeps something in {strange[0]} that is not a tensor.",
                    "Keep extra state in buffers, which a safetensors file can hold.",
                )
            new = beside(file)
            save_tensors(new, state)
            inner = _unwrapped(member)
            spec = inner.spec() if isinstance(inner, Network | ReferenceModel) else EXTERNAL
            entries.append({"file": file, "sha256": sha256(new), "spec": spec})
        trunk = {}
        if stored.preprocessing is not None and stored.preprocessing.trunk is not None:
            new = beside(TRUNK)
            save_tensors(new, stored.preprocessing.trunk.state_dict())
            trunk = {"trunk_sha256": sha256(new)}
        card = model_card(stored, entries, notes=notes)
        for new, path in written.items():
            os.replace(new, path)
            sync_folder(path.parent)
    finally:
        for new in written:
            new.unlink(missing_ok=True)
    write_atomic(folder / CARD, card.encode())
    # Last: a folder without it was interrupted and does not load.
    write_json(
        manifest,
        {
            "classes": stored.classes,
            **({} if stored.preprocessing is None else stored.preprocessing.to_dict()),
            **trunk,
            "members": entries,
            "weights": stored.weights,
            "temperature": stored.temperature,
            "outputs": stored.outputs,
            **({} if num_trained is None else {"num_trained": num_trained}),
        },
    )


def trained_folders(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders of an ensemble's members, and of the networks trained for it that were not chosen."""
    manifest = _read_manifest(folder)
    members = [(folder / str(entry["file"])).parent for entry in manifest["members"]]
    trained = [folder / "members" / str(number) for number in range(manifest.get("num_trained") or 0)]
    return members, [path for path in trained if path not in members]


def pretrained_names() -> list[str]:
    """Return the names of the ensembles that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{MANIFEST}"))


def ensemble_folder(given: str | Path) -> Path:
    """Return a folder, or the one that comes with the package under its name, if it holds no ensemble itself."""
    packaged = str(given) in pretrained_names() and not (Path(given) / MANIFEST).exists()
    return PRETRAINED / given if packaged else Path(given)


def read_ensemble(given: str | Path, *, members: Sequence[nn.Module] | None) -> StoredEnsemble:
    """Check a folder, build its members and fill them; see `Ensemble.load`."""
    folder = ensemble_folder(given)
    manifest = _read_manifest(folder)
    paths = [_member_file(folder, entry) for entry in manifest["members"]]
    modules = _build_members(folder, [entry["spec"] for entry in manifest["members"]], members)
    for path, module in zip(paths, modules, strict=True):
        tensors = _named_as_in(module, load_tensors(path))
        _take_precision(module, tensors)
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} does not fit its member: {reason[:300]}.",
                "Give modules of the architecture that was saved, in the order it was saved in.",
            ) from error
    return StoredEnsemble(
        members=modules,
        weights=manifest["weights"],
        temperature=manifest["temperature"],
        classes=manifest["classes"],
        preprocessing=_preprocessing(folder, manifest) if "image_size" in manifest else None,
        outputs=manifest["outputs"],
    )


def _preprocessing(folder: Path, manifest: dict[str, Any]) -> Preprocessing:
    """Return what pictures go through, with the trunk if there is one."""
    described = manifest.get("trunk")
    if described is None:
        return Preprocessing.from_dict(manifest)
    from dnas_ens.data.trunk import Trunk

    path = folder / TRUNK
    form = {"name": str, "stride": int, "image_size": int}
    if not isinstance(described, dict) or any(type(described.get(key)) is not kind for key, kind in form.items()):
        raise UserError(f"{folder / MANIFEST} is malformed: trunk is of another kind.", "Save the ensemble again.")
    trunk = Trunk(**{key: described[key] for key in form})
    tensors = load_tensors(path)
    if manifest.get("trunk_sha256") != sha256(path):
        raise _replaced(path)
    try:
        trunk.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the trunk {trunk.name}.", "Save the ensemble again.") from error
    return Preprocessing.from_dict(manifest, trunk=trunk)


def _name_inside(module: nn.Module) -> str | None:
    """Return what a wrapper calls the module in it: torch.compile's, one for several devices, a running average."""
    if isinstance(module, nn.DataParallel | DistributedDataParallel | AveragedModel):
        return "module"
    # Only a compilation imports its class, slowly.
    return "_orig_mod" if "_orig_mod" in module._modules else None


def _unwrapped(member: nn.Module) -> nn.Module:
    """Return the module inside any number of wrappers."""
    while (name := _name_inside(member)) is not None:
        member = getattr(member, name)
    return member


def _plain_names(member: nn.Module) -> dict[str, str]:
    """Map the names in a member's state to those without wrappers, which keep nothing of their own."""
    names = {name: name for name in member.state_dict()}
    wrappers = [
        (f"{path}." if path else "", module)
        for path, module in member.named_modules(remove_duplicate=False)
        if _name_inside(module) is not None
    ]
    # The innermost first: its path contains the paths of the others.
    for path, module in reversed(wrappers):
        inside = f"{path}{_name_inside(module)}."
        if isinstance(module, AveragedModel):
            names.pop(f"{path}n_averaged")
        names = {
            own: path + name.removeprefix(inside) if name.startswith(inside) else name for own, name in names.items()
        }
    return names


def _named_as_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return saved tensors under the names that they have in a module, wrapped or not."""
    names = _plain_names(module)
    # A wrapper's own counts stay as they are.
    counts = {own: value for own, value in module.state_dict().items() if own not in names}
    own_of = {name: own for own, name in names.items()}
    return counts | {own_of.get(name, name): value for name, value in tensors.items()}


def _take_precision(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module's tensors the dtypes they were saved in; loading alone would round them to the module's own."""
    saved_in, own_in = (
        {value.dtype for value in state.values() if value.is_floating_point() or value.is_complex()}
        for state in (tensors, module.state_dict())
    )
    if len(saved_in) == 1 and saved_in != own_in:
        # With the buffers that are not in a file, such as constants.
        module.to(saved_in.pop())
    for name, own in module.state_dict(keep_vars=True).items():
        saved = tensors.get(name)
        if saved is not None and saved.is_floating_point() and own.is_floating_point():
            own.data = own.data.to(saved.dtype)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check ensemble.json."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} holds no ensemble: there is no {MANIFEST}.",
            "Name a folder that an ensemble was saved in, a run folder whose members are trained, or one of those that "
            f"come with the package: {', '.join(pretrained_names())}.",
        )
    manifest = read_json(path)
    # Earlier versions wrote no outputs.
    fields: dict[str, Any] = {"weights": None, "classes": None, "temperature": 1.0, "outputs": None}
    fields |= manifest if isinstance(manifest, dict) else {}
    members, temperature, outputs = fields.get("members"), fields["temperature"], fields["outputs"]
    valid = {
        "members": isinstance(members, list)
        and all(
            isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("spec"), dict)
            for entry in members
        ),
        "weights": fields["weights"] is None or _are_numbers(fields["weights"]),
        "temperature": _are_numbers([temperature]) and temperature > 0,
        "classes": fields["classes"] is None or _is_list_of(fields["classes"], str),
        "outputs": outputs is None or isinstance(outputs, list),
    }
    wrong = [key for key, good in valid.items() if not good]
    if wrong:
        raise UserError(f"{path} is malformed: {wrong[0]} is missing or of another kind.", "Save the ensemble again.")
    return fields


def _are_numbers(values: object) -> bool:
    """Whether values are a list of finite numbers; JSON has whole numbers larger than any float."""
    return _is_list_of(values, int, float) and all(abs(value) <= sys.float_info.max for value in values)  # type: ignore[attr-defined]


def _is_list_of(values: object, *kinds: type) -> bool:
    return isinstance(values, list) and all(type(value) in kinds for value in values)


def _member_file(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Return a member's file, which must lie in the folder and have the recorded SHA-256, if there is one."""
    file = str(entry["file"])
    path = folder / file
    try:
        inside = "\0" not in file and path.resolve().is_relative_to(folder.resolve())
        path.is_file()
    except (OSError, ValueError) as error:
        # A name too long, or of characters that no file system has.
        raise UserError(
            f"{folder / MANIFEST} names the file {reprlib.repr(file)}, which cannot be one.",
            "Restore the folder from a copy.",
        ) from error
    if not inside:
        raise UserError(
            f"{folder / MANIFEST} names the file {file!r}, which is outside the folder.",
            "Do not use this folder unless you trust where it is from; name files inside it.",
        )
    if not path.is_file():
        raise UserError(f"The member file {path} is missing.", "Restore it from a copy, or train it again.")
    if entry.get("sha256") not in (None, sha256(path)):
        raise _replaced(path)
    return path


def _replaced(path: Path) -> UserError:
    return UserError(
        f"{path} is not the file that {MANIFEST} was written for: its SHA-256 differs.",
        "It is damaged or was replaced: restore it from a copy, or save the ensemble again.",
    )


def _build_members(
    folder: Path, specs: Sequence[Mapping[str, Any]], members: Sequence[nn.Module] | None
) -> list[nn.Module]:
    """Return a module for every spec: a given one, or a network built where it is of our kind."""
    given = list(members or [])
    if len(given) == len(specs):
        return given
    num_external = sum(spec == EXTERNAL for spec in specs)
    if len(given) != num_external:
        raise UserError(
            f"{folder} holds {len(specs)} members, {num_external} of them external; {len(given)} were given.",
            f"Load it with members=[...] that holds {num_external} fresh modules, in the order of saving.",
        )
    fresh = iter(given)
    try:
        return [next(fresh) if spec == EXTERNAL else _build_member(spec) for spec in specs]
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder / MANIFEST} describes a network that cannot be built ({error}).",
            "Save the ensemble again.",
        ) from error


def _build_member(spec: Mapping[str, Any]) -> nn.Module:
    """Build one of our own members; `Network.from_spec` refuses an unknown kind."""
    return model_from_spec(spec) if spec.get("kind") == REFERENCE_KIND else Network.from_spec(dict(spec))
