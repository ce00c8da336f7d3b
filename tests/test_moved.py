"""Names of version 0.1 work for one version more, and say what they are now."""

import importlib
import subprocess
import sys

import pytest

from lit_alignment import moved
from tests.helpers import ROOT

OLD = [
    ("lit_alignment.models.loading", "Backbone", "BackboneConfig"),
    ("lit_alignment.models.adapters", "Adapter", "AdapterConfig"),
    ("lit_alignment.models.tokens", "NewToken", "NewTokenConfig"),
    ("lit_alignment.models.loading", "Head", "HeadConfig"),
    ("lit_alignment.data.rag", "PassagePlacement", "PassagePlacementConfig"),
    ("lit_alignment.generation.settings", "GenerationSettings", "DecodingConfig"),
]


@pytest.mark.parametrize(("module", "old", "new"), OLD)
def test_renamed_class_is_found_with_a_warning(module, old, new):
    found = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=f"{old} is now .*{new}"):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = found.Nothing


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_moved_module_is_found_with_a_warning(old):
    name = f"lit_alignment.{old}"
    sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match=f"{name} is now lit_alignment.{moved.MODULES[old]}"):
        found = importlib.import_module(name)
    new = importlib.import_module(f"lit_alignment.{moved.MODULES[old]}")
    public = [each for each in vars(new) if not each.startswith("_")]
    assert public and all(getattr(found, each) is getattr(new, each) for each in public)


@pytest.mark.filterwarnings("ignore:lit_alignment.* is now")
@pytest.mark.parametrize("old", sorted(moved.MOVED_NAMES))
def test_name_that_left_its_module_is_found_with_a_warning(old):
    module, _, name = f"lit_alignment.{old}".rpartition(".")
    new_module, _, new = f"lit_alignment.{moved.MOVED_NAMES[old]}".rpartition(".")
    found = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=f"{module}.{name} is now {new_module}.{new};"):
        assert getattr(found, name) is getattr(importlib.import_module(new_module), new)


@pytest.mark.slow
def test_code_of_the_earlier_version_runs():
    code = """
from lit_alignment.data.records import Source
from lit_alignment.strategies.fsdp2 import FSDP2Strategy
from lit_alignment.callbacks.cherry_picks import CherryPicks
from lit_alignment.checkpoints import newest_checkpoint
print(Source("x.jsonl").path, CherryPicks.__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split() == ["x.jsonl", "CherryPicks"]
    assert run.stderr.count("the old name goes with the next version") == 3
