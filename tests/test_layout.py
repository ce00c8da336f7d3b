"""What the layout promises: imports point one way, nothing asks which method runs, light start, public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "lit_alignment"
FILES = sorted(PACKAGE.rglob("*.py"))
# Rooms from the ground up. A file may import its own room and those that stand on lower lines.
STOREYS = [
    ["errors", "moved", "secrets", "terminal"],
    ["paths", "quiet"],
    ["config_files", "config_types", "files", "optimizers"],
    ["config_errors", "config_help", "config_items", "loggers", "losses", "metrics", "optimization", "data.sources"],
    ["data.encoding"],
    ["data.batching", "data.multimodal"],
    ["data"],
    ["models"],
    ["checkpoints", "planning", "retrieval", "evaluation"],
    ["generation", "distributed", "report"],
    ["rollout", "hooks"],
    ["training"],
    ["modules"],
    ["callbacks"],
    ["vllm"],
    ["trainer_cli"],
    ["tools"],
    ["cli"],
    ["__main__", "__init__"],
]
LEVELS = {room: level for level, storey in enumerate(STOREYS) for room in storey}
# They put methods together with what they need.
ASSEMBLES = ("trainer_cli.py", "__init__.py")


def room_of(module: str) -> str:
    """The innermost room that a dotted name below the package belongs to."""
    parts = module.split(".")
    return next(name for length in (2, 1) if (name := ".".join(parts[:length])) in LEVELS)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> list[tuple[str, str, bool]]:
    """Modules of the package that a file imports, with each name, and whether it does so when it is imported itself."""
    tree = ast.parse(path.read_text())
    checking = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    top = {id(node) for node in tree.body} - checking
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None or id(node) in checking:
            continue
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            is_module = (ROOT / f"{whole.replace('.', '/')}.py").exists()
            module = whole if is_module else node.module
            if module.startswith("lit_alignment."):
                found.append((module.removeprefix("lit_alignment."), alias.name, id(node) in top))
    return found


def test_every_file_has_a_room():
    for path in FILES:
        assert room_of(name_of(path)), path
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {room.split(".")[0] for room in LEVELS}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_runs_up(path):
    room = room_of(name_of(path))
    for module, _, _ in imports(path):
        other = room_of(module)
        assert other == room or LEVELS[other] < LEVELS[room], f"{name_of(path)} ({room}) imports {module} ({other})"


def test_no_imports_run_in_a_circle():
    graph = {name_of(path): {module for module, _, top in imports(path) if top} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in graph.get(module, set()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_outside_modules_knows_a_method(path):
    if room_of(name_of(path)) == "modules" or path.name in ASSEMBLES:
        return
    known = {name for module, name, _ in imports(path) if module.startswith("modules.") and name[0].isupper()}
    assert known <= {"AlignmentModule"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_outside_modules_asks_for_a_class_by_its_name_or_probes_a_module(path):
    if room_of(name_of(path)) in ("modules", "training"):  # what modules are, and what they are made of
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = {each.attr for side in sides for each in ast.walk(side) if isinstance(each, ast.Attribute)}
            assert not asked & {"__name__", "__qualname__"}, f"{path}:{node.lineno}"
            texts = [ast.unparse(side) for side in sides]
            assert not any(text.endswith(("module.kind", "model.kind", "data.kind")) for text in texts), node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            probed = ast.unparse(node.args[0])
            assert probed.split(".")[-1] not in ("module", "pl_module", "lightning_module"), node.lineno
            assert probed != "cli.model", node.lineno


def test_data_imports_neither_models_nor_modules_and_sources_no_tokens():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {room_of(module) for module, _, _ in imports(path)} & {"models", "modules"}
    for path in [*(PACKAGE / "data/sources").glob("*.py"), PACKAGE / "data/examples.py"]:
        text = path.read_text()
        assert "import lightning" not in text and "from lightning" not in text, path
    for path in (PACKAGE / "data/sources").glob("*.py"):
        assert "transformers" not in path.read_text(), path


def test_losses_import_torch_only():
    for path in (PACKAGE / "losses").glob("*.py"):
        tree = ast.parse(path.read_text())
        found = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in found} <= {"torch", "lit_alignment", *sys.stdlib_module_names}


def test_no_module_knows_a_strategy_or_an_engine():
    for path in (PACKAGE / "modules").glob("*.py"):
        for module, name, _ in imports(path):
            assert not name.endswith("Strategy") and not module.startswith("vllm"), f"{path} imports {name}"


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
