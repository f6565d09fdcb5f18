"""Public names of a package, imported at their first use, so that importing the package stays quick and torch-free."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable


def lazy_names(package: str, *own: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package (PEP 562).

    Its public names are those that its ``if TYPE_CHECKING:`` block imports from this project: written once, they are
    what a type checker sees and what is imported at run time.

    Args:
        package: ``__name__`` of the package.
        own: Public names that it defines itself.
    """
    spec = importlib.util.find_spec(package)
    source = spec.loader.get_source(package) if spec and spec.loader else None  # type: ignore[attr-defined]
    homes = {
        alias.name: statement.module
        for block in ast.parse(source or "").body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("dnas_ens.")
        for alias in statement.names
    }

    public = sorted({*homes, *own})

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*public, *(name for name in vars(sys.modules[package]) if name.startswith("__"))})

    return get, names, public
