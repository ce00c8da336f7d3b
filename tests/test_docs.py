"""What the documents say is there, is there."""

import ast
import dataclasses
import inspect
import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import yaml

from lit_alignment.callbacks.export import Export
from lit_alignment.callbacks.memory import MemorySnapshot
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
from lit_alignment.losses.policy_config import PRESETS, READS, PolicyLossConfig
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.dual_encoder import RetrieverConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.multimodal.modality import ModalityConfig
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.models.multimodal.vision import EncoderConfig
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.modules.classification import ClassificationModule
from lit_alignment.modules.policy import PolicyModule
from lit_alignment.modules.rag import RAGModule
from lit_alignment.modules.retriever import RetrieverModule
from lit_alignment.modules.reward import RewardModule
from lit_alignment.modules.sft import SFTModule
from lit_alignment.modules.vlm import VLMModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig
from lit_alignment.rollout import (
    ExactMatchReward,
    FormatReward,
    JsonEquality,
    LengthReward,
    ModelReward,
    PythonReward,
    ReasoningGymReward,
    RegexMatch,
)
from lit_alignment.rollout.config import RolloutConfig
from lit_alignment.rollout.samplers import TransformersSampler
from lit_alignment.tools.parsers import PARSERS
from lit_alignment.trainer_cli import AlignmentCLI, build
from lit_alignment.vllm.sampler import VLLMSampler
from lit_alignment.vllm.server_sampler import ServerSampler
from tests.helpers import ROOT, base_model_folder

README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "configs").rglob("*.md")))
}
GUIDE = "\n".join(text for name, text in PAGES.items() if name != "README.md")
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
REWARDS = [ExactMatchReward, RegexMatch, JsonEquality, LengthReward, FormatReward, ModelReward, PythonReward]
SETTINGS += [PolicyModule, PolicyLossConfig, RolloutConfig, TransformersSampler, VLLMSampler, ServerSampler]
SETTINGS += [*REWARDS, ReasoningGymReward]
SETTINGS += [
    SFTModule,
    ClassificationModule,
    RewardModule,
    CherryPicks,
    ScoredPicks,
    Export,
    MemorySnapshot,
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
        names = [field.name for field in dataclasses.fields(owner) if field.init]
    else:
        names = [name for name in inspect.signature(owner).parameters if name not in ("tokenizer", "self", "settings")]
    missing = [name for name in names if f"`{name}`" not in GUIDE]
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_files_in_the_documents_exist(name):
    text = PAGES[name]
    assert set(re.findall(r"lit-alignment ([a-z]+)", text)) <= {*TRAINER_COMMANDS, *TOOLS}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    for file in re.findall(r"(?<![\w/.])((?:configs|tests|benchmarks)/[\w./-]+\.\w+)", text):
        assert (ROOT / file).exists() or file in made_by_commands(text), file


def made_by_commands(text):
    """Files that commands of a page write to where the recipes stand in a checkout."""
    return set(re.findall(r"--out (\S+)", text))


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            assert not path or (page.parent / path).exists(), target
        if anchor and (not path or path.endswith(".md")):
            headings = re.findall(r"^#+ (.+)$", (page.parent / path if path else page).read_text(), re.M)
            slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", each).strip().lower()) for each in headings}
            assert anchor in slugs, target


def written_commands():
    """Page and arguments of each command of ours that stands in a block of a page, once each."""
    seen = {}
    for name, text in PAGES.items():
        lines = text.replace("\\\n", " ").splitlines()
        for line in lines:
            found = re.match(r"(?:    |\$ |    \$ )?(?:\S*/)?lit-alignment (?!.*\.\.\.)(.+)", line)
            if found:
                seen.setdefault(tuple(shlex.split(found[1], comments=True)), name)
    return [(name, arguments) for arguments, name in seen.items()]


def shown(value):
    return value if isinstance(value, str) else " ".join(value)[:80]


@pytest.mark.slow
@pytest.mark.parametrize("name, arguments", written_commands(), ids=shown)
def test_options_of_each_command_are_taken(name, arguments):
    command, *options = arguments
    assert command in {*TRAINER_COMMANDS, *TOOLS}
    if "--help" in options:
        return
    if command not in TRAINER_COMMANDS and command not in ("inspect", "estimate", "preprocess", "index"):
        known, others = PARSERS[command]().parse_known_args(options)
        assert command == "serve" or not others  # those of vLLM
        return
    if command not in TRAINER_COMMANDS:
        _, options = PARSERS[command]().parse_known_args(options)
    given = [ours(each, name) for each in without_overlays(options) if each != "--print_config"]
    assert configured(*without_checkpoint(given))


@cache
def configured(*options):
    """The configuration that options give; many commands have the same."""
    with mock.patch.object(AlignmentCLI, "instantiate_classes", lambda self: None):
        return build([*options]).config


def ours(option, page):
    """A file of the reader stands for the smallest recipe of the method that it, or the page, is named after."""
    if not is_of_the_reader(option):
        return option
    recipes = [Path(f"configs/{method}/tiny.yaml") for method in (Path(option).stem, Path(page).parent.name, "sft")]
    return str(next(path for path in recipes if (ROOT / path).is_file()))


def is_of_the_reader(option):
    return option.endswith((".yaml", ".json")) and not option.startswith("configs/")


def without_overlays(options):
    """All options but files of the reader behind the first one, which change it."""
    own = [number for number, each in enumerate(options) if is_of_the_reader(each)][1:]
    return [each for number, each in enumerate(options) if number not in own and number + 1 not in own]


def without_checkpoint(options):
    """All options but those of other commands than fit."""
    dropped = [number for number, each in enumerate(options) if each in ("--ckpt_path", "--engine")]
    return [each for number, each in enumerate(options) if number not in dropped and number - 1 not in dropped]


def test_yaml_in_the_guide_is_yaml():
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    assert len(blocks) >= 5
    for block in blocks:
        assert isinstance(yaml.safe_load(block), dict)


def test_python_in_the_readme_trains_and_answers_in_ten_lines(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(block.split("\n")) <= 10
    steps = {"HuggingFaceTB/SmolLM2-135M-Instruct": base_model_folder(tmp_path / "base"), "max_epochs=1": "max_steps=1"}
    for word, other in {**steps, "configs/": f"{ROOT}/configs/"}.items():
        assert word in block
        block = block.replace(word, other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(block)
    model = runpy.run_path(str(tmp_path / "example.py"))["model"]
    answer = model.chat("The invoice for my electric fan shows the wrong amount.")
    assert capsys.readouterr().out.endswith(f"{answer}\n")


def test_table_of_policy_losses_is_that_of_the_code():
    row = r"^\| `(\w+)`(?: \(default\))? \|" + r" (.*?) ?\|" * 5 + "$"
    table = {name: cells for name, *cells in re.findall(row, GUIDE, re.M)}
    assert PRESETS.keys() <= table.keys()
    for name, form in PRESETS.items():
        *choices, usual = table[name]
        assert choices == [f"`{each}`" for each in (form.objective, form.ratio, form.aggregate, form.advantage)]
        assert {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.]+)", usual)} == form.usual
    for name, settings in READS.items():
        (row,) = re.findall(rf"^\| `{name}` \| [^|`]+ \| (.*) \|$", GUIDE, re.M)
        shown = dict(re.findall(r"`(\w+)` \(?([\d.]+|none)", row))
        assert {key: float(shown[key].replace("none", "inf")) for key in shown} == settings


def test_reward_of_the_guide_scores_as_it_says(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n# my_rewards.py\n(.*?)```", GUIDE, re.S)
    (tmp_path / "my_rewards_of_the_guide.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reward = PythonReward(function="my_rewards_of_the_guide.words_right", arguments={"penalty": 0.1}, timeout=10)
    assert reward(["a b", "b\nc", ""], {"label": "a b"}) == [1.0, 0.4, 0.0]
    assert reward(["a"], {}) == [None]


def test_every_setting_of_the_placement_is_in_the_guide():
    assert all(f"`placement.{field.name}`" in GUIDE for field in dataclasses.fields(PassagePlacementConfig))
