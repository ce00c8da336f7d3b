"""What the documents say is there, is there."""

import ast
import dataclasses
import inspect
import re
from functools import cache

import pytest
import yaml

from lit_alignment.callbacks.export import Export
from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.callbacks.refresh import IndexRefresh
from lit_alignment.callbacks.samples.answers import CherryPicks
from lit_alignment.callbacks.samples.scores import ScoredPicks
from lit_alignment.callbacks.throughput import Throughput
from lit_alignment.callbacks.upload import Upload
from lit_alignment.cli import TOOLS, TRAINER_COMMANDS
from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.data.classification import ClassificationDataModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.rag import PassagePlacementConfig, RAGDataModule
from lit_alignment.data.reward import RewardDataModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.vlm import VLMDataModule
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.loggers import ClearMLLogger
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.dual_encoder import RetrieverConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.multimodal.modality import ModalityConfig
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.models.multimodal.vision import EncoderConfig
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.modules.classification import ClassificationModule
from lit_alignment.modules.rag import RAGModule
from lit_alignment.modules.retriever import RetrieverModule
from lit_alignment.modules.reward import RewardModule
from lit_alignment.modules.sft import SFTModule
from lit_alignment.modules.vlm import VLMModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "configs/README.md").read_text()
SETTINGS = [
    BackboneConfig,
    AdapterConfig,
    TokensConfig,
    NewTokenConfig,
    OptimizerConfig,
    EncodingConfig,
    TemplateConfig,
    SourceConfig,
    DecodingConfig,
]
SETTINGS += [AlignmentDataModule, ClassificationDataModule, RewardDataModule, RAGDataModule]
SETTINGS += [RAGModule, RetrieverModule, RetrieverConfig, IndexConfig, IndexRefresh]
SETTINGS += [VLMModule, VLMDataModule, ModalityConfig, EncoderConfig, ProjectorConfig]
SETTINGS += [
    SFTModule,
    ClassificationModule,
    RewardModule,
    CherryPicks,
    ScoredPicks,
    Export,
    PredictionWriter,
    Throughput,
    Upload,
    ClearMLLogger,
]


def rows():
    return re.findall(r"^\| ([A-I]\d*b?) \|.*`(\S+)::(\w+)` \|$", (ROOT / "tests/README.md").read_text(), re.M)


@cache
def functions(file):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_guarantee_table_names_tests_that_exist():
    assert len(rows()) >= 40
    for _, file, name in rows():
        assert name in functions(file), (file, name)


def test_every_guarantee_of_this_method_has_a_row():
    expected = {"A1", "A2", "A2b", "A3", "A4", "A5", "A6", "B1", "B2", "B3", "B4", "B5", "C1", "C2"}
    expected |= {"D1", "D2", "D3", "D4", "G1", "G2", "G3", "G4", "H1", "H2", "E1", "E2", "E3", "E4", "E6", "I"}
    assert expected <= {name for name, _, _ in rows()}


@pytest.mark.parametrize("owner", SETTINGS, ids=lambda owner: owner.__name__)
def test_every_setting_is_in_the_guide(owner):
    if dataclasses.is_dataclass(owner):
        names = [field.name for field in dataclasses.fields(owner)]
    else:
        names = [name for name in inspect.signature(owner).parameters if name not in ("tokenizer", "self", "settings")]
    missing = [name for name in names if f"`{name}`" not in GUIDE]
    assert not missing


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_commands_and_files_in_the_documents_exist(text):
    commands = re.findall(r"lit-alignment ([a-z]+)", text)
    assert commands and set(commands) <= {*TRAINER_COMMANDS, *TOOLS}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    for name in re.findall(r"(?<![\w/])((?:configs|tests|benchmarks)/[\w./-]+\.\w+)", text):
        assert (ROOT / name).exists(), name


def test_yaml_in_the_guide_is_yaml():
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    assert len(blocks) >= 5
    for block in blocks:
        assert isinstance(yaml.safe_load(block), dict)


def test_python_in_the_readme_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_every_setting_of_the_placement_is_in_the_guide():
    assert all(f"`placement.{field.name}`" in GUIDE for field in dataclasses.fields(PassagePlacementConfig))
