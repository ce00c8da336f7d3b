"""What a checkpoint, or a folder of an adapter or a classifier, says of its model."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from torch import Tensor

from lit_alignment.checkpoints.reading import is_deepspeed, read_deepspeed, read_plain
from lit_alignment.checkpoints.sharded import is_sharded, read_whole
from lit_alignment.data.multimodal.media import MODALITIES
from lit_alignment.errors import AlignmentError, CheckpointError, ConfigError
from lit_alignment.files import config_from, read_json
from lit_alignment.models.adapters import AdapterConfig, inert_peft
from lit_alignment.models.dual_encoder import DUAL, RetrieverConfig
from lit_alignment.models.loading import BackboneConfig, HeadConfig
from lit_alignment.models.multimodal.modality import ModalityConfig, read_modality
from lit_alignment.models.reference import is_reference
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.paths import local_path, suggestion

CHECKPOINT_KEY = "lit_alignment"
Family = Literal["text", "media", "passages", "scores", "vectors"]
MEASURED = ("calibration_temperature", "reward_mean", "reward_std")
PROBLEMS: dict[str, Any] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint or an adapter folder says about its model.

    Args:
        backbone: The base; whether its code may run is never taken from a file.
        peft: New adapters that were trained.
        adapter: An existing adapter that was trained on, or the folder itself.
        tokens: New tokens.
        trained: Trained weights by name; empty for an adapter folder, which `adapter` names.
        stop: Token ids and strings that end a turn; None where the folder has its own generation config.
        chat_template: The Jinja template that training used.
        head: What scores, if it is no language model.
        modalities: How images and sounds enter, by name.
        networks: Trained weights of the networks beside the language model, by network and name.
        frozen: Whether the language model did not learn.
        retriever: How texts become vectors, where the model retrieves.
        method: What the method's own settings were, as plain values; so far as they decide answers.
        asking: What decides how a question is encoded, as plain values.
        run: What it says of its training, as plain values.
        whole: Whether the base holds all weights: the folder of an export, or a model of the hub.
    """

    backbone: BackboneConfig
    peft: PeftConfig | None
    adapter: AdapterConfig | None
    tokens: TokensConfig
    trained: dict[str, Tensor]
    stop: dict[str, Any] | None
    chat_template: str | dict[str, str] | None
    head: HeadConfig | None = None
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    frozen: bool = False
    retriever: RetrieverConfig | None = None
    method: dict[str, Any] = field(default_factory=dict)
    asking: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    @property
    def family(self) -> Family:
        """What the model does."""
        if self.head is not None:
            return "scores"
        if self.retriever is not None:
            return "passages" if DUAL in self.networks or self.method else "vectors"
        return "media" if self.modalities else "text"


def read_model(source: str | Path, base: str | None = None, trust_remote_code: bool = False) -> Saved:
    """What stands in whatever holds a model: what `read_saved` reads, the folder of an export, or a model's name.

    Args:
        source: A file, a folder, or a name on the hub or of `lit-alignment fetch`.
        base: The base model, if it is not where the source says.
        trust_remote_code: Run code that comes with the model.

    Raises:
        CheckpointError: If it is a file or folder of something else.
        ConfigError: If there is no such file, folder or model.
    """
    path = Path(source).expanduser()
    whole = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    if path.exists() and not whole:
        return read_saved(path, base, trust_remote_code)
    if path.suffix == ".ckpt" and not whole:
        raise ConfigError(f"{source}: no such checkpoint (looked from {Path.cwd()}). Check the path.")
    if base is not None:
        raise ConfigError(f"{source} is a whole model, which has no base. Remove the base.")
    folder = Path(local_path(str(source), "the path"))
    if whole and read_json(path / "config.json", "a model's configuration").get("model_type") == "llava":
        raise ConfigError(
            f"{source}: a LLaVA, which transformers' LlavaForConditionalGeneration loads. Give the checkpoint."
        )
    if whole and (path / "media").is_dir():
        raise ConfigError(f"{source}: a language model with projectors beside it. Give the checkpoint instead.")
    backbone = BackboneConfig(str(source), trust_remote_code=trust_remote_code)
    return Saved(backbone, None, None, TokensConfig(), {}, None, None, head_of(folder), whole=True)


def read_saved(source: Path, base: str | None = None, trust_remote_code: bool = False) -> Saved:
    """What stands in a checkpoint file, a folder of a sharded checkpoint, or an adapter folder.

    Args:
        source: The file or folder.
        base: The base model, if it is not where the source says.
        trust_remote_code: Run code that comes with the base.

    Raises:
        CheckpointError: If it is none of these, or does not say what it belongs to.
    """
    if (source / "adapter_config.json").is_file():
        saved = _read_adapter(source, base)
    elif is_sharded(source):
        saved = _read_content(source, read_whole(source, optimizers=False))
    elif source.is_file() or is_deepspeed(source):
        saved = _read_content(source, read_deepspeed(source) if source.is_dir() else read_plain(source))
    elif not source.exists():
        fix = suggestion(str(source), "Give a checkpoint of a run, or the folder of an adapter.")
        raise CheckpointError(f"{source}: no such file or folder (looked from {Path.cwd()}). {fix}")
    else:
        raise CheckpointError(
            f"{source}: no checkpoint file, sharded checkpoint (with .metadata), folder of DeepSpeed (with latest) or "
            f"adapter folder (with adapter_config.json).{_nearest(source)}"
        )
    path = base or saved.backbone.path
    return replace(saved, backbone=replace(saved.backbone, path=path, trust_remote_code=trust_remote_code))


def _nearest(folder: Path) -> str:
    """The newest checkpoint of a run, for who has given the run's folder."""
    patterns = ("*.ckpt", "checkpoints/*.ckpt", "version_*/checkpoints/*.ckpt")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return f" Did you mean {max(found, key=lambda path: path.stat().st_mtime)}?" if found else ""


def _read_content(source: Path, content: dict[str, Any]) -> Saved:
    try:
        return _from_content(source, content)
    except AlignmentError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"what it says of its model has the wrong form ({type(error).__name__}: {error})"
        raise CheckpointError(f"{source}: {problem}. It is damaged, or of another version of lit_alignment.") from error


def _from_content(source: Path, content: dict[str, Any]) -> Saved:
    info = content.get(CHECKPOINT_KEY)
    if not isinstance(info, dict):
        raise CheckpointError(f"{source}: not written by lit_alignment: it does not say what model it belongs to.")
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in _weights(source, content).items():
        if is_reference(name):  # of training alone
            continue
        network, _, rest = name.partition(".")  # the module's attribute
        networks.setdefault(network, {})[rest] = value
    tokens = _dict(source, "tokens", info.get("tokens"))
    new = _dict(source, "tokens.new", tokens.get("new", {}))
    tokens = tokens | {"new": {token: config_from(NewTokenConfig, how, source) for token, how in new.items()}}
    modalities = _dict(source, "modalities", info.get("modalities", {}))
    if not modalities.keys() <= set(MODALITIES):  # each becomes the name of a folder
        raise TypeError(f"modalities are {reprlib.repr([*modalities])}")
    peft, adapter, head, template = (info.get(key) for key in ("peft", "adapter", "head", "chat_template"))
    retriever = info.get("retriever")
    if not isinstance(template, str | dict | None):
        raise TypeError(f"chat_template is {reprlib.repr(template)}")
    return Saved(
        backbone=config_from(BackboneConfig, info.get("backbone"), source),
        peft=None if peft is None else inert_peft(peft, source),
        adapter=None if adapter is None else config_from(AdapterConfig, adapter, source),
        tokens=config_from(TokensConfig, tokens, source),
        trained=networks.pop("model", {}),
        stop=None if info.get("stop") is None else _dict(source, "stop", info["stop"]),
        chat_template=template,
        head=None if head is None else read_head(head, source),
        modalities={name: read_modality(values, source) for name, values in modalities.items()},
        networks=networks,
        frozen=bool(info.get("frozen", False)),
        retriever=None if retriever is None else config_from(RetrieverConfig, retriever, source),
        method=_dict(source, "method", info.get("method", {})),
        asking=_dict(source, "asking", info.get("asking", {})),
        run=_dict(source, "run", info.get("run", {})),
    )


def _weights(source: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    state = _dict(source, "state_dict", content.get("state_dict"))
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise CheckpointError(f"{source}: the weight '{wrong}' is no tensor. Use another checkpoint.")
    return state


def _dict(source: Path, what: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{source}: {what} is missing, or no dict of names. It is damaged; use another one.")
    return values


def read_head(values: Any, where: object) -> HeadConfig:
    """A head from plain values of a file."""
    return config_from(HeadConfig, {**values, "labels": tuple(values.get("labels", ()))}, where)


def _read_adapter(folder: Path, base: str | None) -> Saved:
    file = folder / "adapter_config.json"
    config = read_json(file, "an adapter's configuration")
    path, revision = base or config.get("base_model_name_or_path"), str(config.get("revision") or "main")
    if not path or not isinstance(path, str):
        raise CheckpointError(f"{file} does not name its base model. Give --base.")
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    head = head_of(folder)
    return Saved(
        BackboneConfig(path, revision, own), None, AdapterConfig(str(folder)), TokensConfig(), {}, None, None, head
    )


def head_of(folder: Path) -> HeadConfig | None:
    """The head that a folder's configuration describes, or None if it is no classifier's.

    Raises:
        ConfigError: If the configuration is damaged.
    """
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json", "a model's configuration")
    try:
        if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or []):
            return None
        names: Mapping[str, str] = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        problem = PROBLEMS.get(config.get("problem_type") or "", "regression" if len(names) == 1 else "single_label")
        labels = tuple(names[str(index)] for index in range(len(names)))
    except (KeyError, TypeError, AttributeError) as error:
        problems = "architectures, problem_type or id2label (all labels, from 0 on)"
        raise CheckpointError(f"{folder / 'config.json'}: {problems} have the wrong form ({error}).") from error
    measured = {name: config[name] for name in MEASURED if name in config}
    return config_from(HeadConfig, {"labels": labels, "problem": problem, "measured": measured}, folder / "config.json")
