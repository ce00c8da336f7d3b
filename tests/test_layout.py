"""What the layout promises: imports point one way, light start, every public thing documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "lit_alignment"
FILES = sorted(PACKAGE.rglob("*.py"))
# A layer may import itself and what stands to its left; data never imports models or modules.
ALLOWED = {
    "errors": set(),
    "paths": {"errors"},
    "losses": {"errors"},
    "metrics": {"errors"},
    "data": {"errors", "paths"},
    "models": {"errors", "paths", "losses"},
    "retrieval": {"errors", "paths", "data"},
    "generation": {"errors", "paths", "metrics", "data", "models"},
    "optimization": {"errors"},
    "strategies": {"errors", "models"},
    "modules": {
        "errors",
        "paths",
        "optimization",
        "strategies",
        "losses",
        "metrics",
        "data",
        "models",
        "retrieval",
        "generation",
    },
}


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lit_alignment."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer in ALLOWED:
        assert imports(path) <= ALLOWED[layer] | {layer}


def test_losses_import_torch_only():
    for path in (PACKAGE / "losses").glob("*.py"):
        tree = ast.parse(path.read_text())
        found = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in found} <= {"torch", "typing", "lit_alignment"}


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, lit_alignment.cli; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_public_names_can_be_imported():
    import lit_alignment

    for name in lit_alignment.__all__:
        assert getattr(lit_alignment, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = lit_alignment.Nothing
