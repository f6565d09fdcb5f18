"""The section on how a run was made: data, search, recipe, machine, versions, commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from dnas_ens.report.parts import Section, duration
from dnas_ens.report.run_files import RunFiles
from dnas_ens.space.spaces import rules_of

PACKAGES = ("dnas_ens", "torch", "torchvision", "numpy", "scipy", "scikit-learn")


def provenance_section(files: RunFiles) -> Section:
    """Everything needed to do it again."""
    facts = {
        "Data": _data(files),
        "Search": _search(files),
        "Members": _recipe(files),
        **_machine(files.environment[-1] if files.environment else {}),
    }
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>\n" for name, value in facts.items() if value)
    commands = "\n".join(
        f"{str(entry.get('time', ''))[:16].replace('T', ' ')}  {shlex.join(map(str, entry['command']))}".strip()
        for entry in files.environment
        if entry.get("command")
    )
    below = f'<pre tabindex="0"><code>{escape(commands)}</code></pre>\n' if commands else ""
    return Section(
        name="provenance",
        title="How this run was made",
        text=f'<dl class="facts">\n{listed}</dl>\n' if listed else "",
        below=below,
    )


def _data(files: RunFiles) -> str:
    described = files.data
    splits = described.get("splits", {})
    counts = ", ".join(f"{part['num_images']:,} {name}" for name, part in splits.items() if "num_images" in part)
    size = described.get("image_size")
    parts = [
        files.data_name,
        f"{described['num_classes']} classes" if "num_classes" in described else "",
        f"{size}×{size} pixels, {described.get('num_channels')} channel"
        + ("s" if described.get("num_channels") != 1 else "")
        if size
        else "",
        f"images: {counts}" if counts else "",
        f"fingerprint {described['fingerprint'][:12]}" if "fingerprint" in described else "",
    ]
    return "; ".join(part for part in parts if part)


def _search(files: RunFiles) -> str:
    config, found = files.config.get("search", {}), files.found or {}
    if files.budget and not found:
        # It wanted no other cells.
        return ""
    supernet, bilevel, report = config.get("supernet", {}), config.get("bilevel", {}), found.get("report") or {}
    channels = supernet.get("channels") or rules_of(supernet.get("space", "darts")).channels
    # A search by the star alone has no epochs, and a budget's is one.
    has_epochs = not files.budget and config.get("objective", {}).get("likelihood") != "none"
    parts = [
        f"preset {config['preset']}" if "preset" in config else "",
        f"regime {config['regime']}" if "regime" in config else "",
        f"penalty {config['objective']['penalty']}" if "objective" in config else "",
        f"{supernet['num_cells']} cells, {channels} channels" if "num_cells" in supernet else "",
        f"{bilevel['epochs']} epochs" if "epochs" in bilevel and has_epochs else "",
        f"{len(found['candidates'])} candidates" if found.get("candidates") else "",
        f"seed {config['seed']}" if "seed" in config else "",
        f"{duration(report['wall_seconds'])} on the clock" if "wall_seconds" in report else "",
    ]
    return "; ".join(part for part in parts if part)


def _recipe(files: RunFiles) -> str:
    config = files.config.get("retrain", {})
    if "epochs" not in config:
        return ""
    cycles = f", {config['cycles']} cycles of {config['cycle_epochs']}" if config.get("cycles") else ""
    parts = [
        f"{config['num_cells']} cells, {(files.budget or config)['channels']} channels",
        "epochs as the budget chose" if files.budget else f"{config['epochs']} epochs from scratch{cycles}",
        f"batches of {config['batch_size']}",
        f"learning rate {config['learning_rate']:g}",
        f"seed {config['seed']}",
    ]
    return "; ".join(parts)


def _machine(entry: Mapping[str, Any]) -> dict[str, str]:
    packages = entry.get("packages", {})
    cores = f", {entry['num_cpus']} cores" if entry.get("num_cpus") else ""
    revision = str(entry.get("git_revision") or "")
    return {
        "Machine": ", ".join(
            part for part in (str(entry.get("cuda_device") or ""), f"{entry.get('cpu') or ''}{cores}") if part
        ),
        "Versions": ", ".join(
            f"{name} {packages[name]}" + (f" (revision {revision[:10]})" if name == "dnas_ens" and revision else "")
            for name in PACKAGES
            if name in packages
        ),
    }
