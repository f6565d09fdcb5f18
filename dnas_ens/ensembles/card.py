"""The model card of a saved ensemble: what it takes and gives, what is in it, how it is used (arXiv 1810.03993)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dnas_ens.nn.network import Network, count_parameters

if TYPE_CHECKING:
    from dnas_ens.ensembles.storage import StoredEnsemble

CARD = "MODEL_CARD.md"
#: The kind of a member that only its owner can build, such as a torchvision network.
EXTERNAL = {"kind": "external"}


def model_card(stored: StoredEnsemble, entries: Sequence[Mapping[str, Any]], *, notes: str | None = None) -> str:
    """Return the card as Markdown.

    Args:
        stored: The ensemble.
        entries: Those of its members in ensemble.json.
        notes: What only its owner knows, such as where the images are from and what was measured on others.
    """
    members = list(stored.members)
    shares = stored.weights or [1 / len(members)] * len(members)
    rows = [
        f"| `{entry['file']}` | {type(member).__name__} | {count_parameters(member):,} | {share:.3f} |"
        for entry, member, share in zip(entries, members, shares, strict=True)
    ]
    fresh = sum(entry["spec"] == EXTERNAL for entry in entries)
    load = f'de.load("FOLDER", members=[...])  # fresh ones for your {fresh} own' if fresh else 'de.load("FOLDER")'
    cells = {str(member.genotype): None for member in members if isinstance(member, Network)}
    parts = [
        f"# An ensemble of {len(members)} networks that classifies images",
        f"{_takes(stored)} It gives the probabilities of {_classes(stored.classes)}: the average of the members' "
        f"probabilities by their weights, then tempered with T = {stored.temperature:.4g}, which was fitted on images "
        "that no member was trained on, unless it is 1.",
        *([notes] if notes else ["Figures on test images are in `results.md` beside this file, once it is evaluated."]),
        "## Use",
        f'```python\nimport dnas_ens as de\n\nensemble = {load}\nprint(ensemble.predict(["a.png", "b.png"]))\n```',
        "As a command: `python -m dnas_ens.predict FOLDER pictures/`.",
        "## Members",
        "\n".join(["| file | kind | parameters | weight |", "|:--|:--|--:|--:|", *rows]),
        *(["Their cells:", *(f"```\n{cell}\n```" for cell in cells)] if cells else []),
        "## Limits",
        "Every picture gets one of these classes, also one that shows none of them. The probabilities hold for "
        "pictures like those it was trained on; on others they are often too high. Nothing is known of how it treats "
        "groups of people.",
    ]
    return "\n\n".join(parts) + "\n"


def _takes(stored: StoredEnsemble) -> str:
    wanted = stored.preprocessing
    if wanted is None:
        return "It takes images as its members do, normalised."
    kind = "grey" if wanted.num_channels == 1 else "in colour"
    trunk = "" if wanted.trunk is None else f" Its members share the first stages of {wanted.trunk.name}, frozen."
    return (
        f"It takes pictures of any size: the short side becomes {wanted.image_size} pixels, the centre is cut out, and "
        f"the pixels, {kind}, are normalised.{trunk}"
    )


def _classes(classes: object) -> str:
    names = list(classes) if isinstance(classes, list | tuple) else []
    if not names:
        return "its classes, which have no names here"
    return f"{len(names)} classes ({', '.join(map(str, names[:20]))}{', ...' if len(names) > 20 else ''})"
