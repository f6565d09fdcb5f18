"""The report of a run: one self-contained page, and its figures as files and TensorBoard images."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: str | Path) -> Path:
    """Write report.html and figures/ of a run folder from its files.

    Args:
        folder: A run folder at any stage; sections without input are left out.

    Returns:
        The page's path.

    Raises:
        UserError: It is not a run folder, a file in it is damaged, or it cannot be written.
    """
    from dnas_ens.report.page import write

    return write(Path(folder))
