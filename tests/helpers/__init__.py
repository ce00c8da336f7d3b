"""Small models, data and runs that many tests share."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import LoraConfig
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_alignment import (
    AtomicCheckpointIO,
    ClassificationDataModule,
    ClassificationModule,
    DistillationDataModule,
    DistillationModule,
    PolicyDataModule,
    PolicyModule,
    PreferenceDataModule,
    PreferenceModule,
    RAGDataModule,
    RAGModule,
    RewardDataModule,
    RewardModule,
    SFTDataModule,
    SFTModule,
    VLMDataModule,
    VLMModule,
)
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record, read_record
from lit_alignment.data.encoding.responses import ResponseEncoder
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.passages import Passage, format_passage
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.generation.engine import Request
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.models.dual_encoder import RetrieverConfig, load_retriever, weights_hash
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.multimodal.modality import ModalityConfig
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.models.multimodal.vision import EncoderConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.build import IndexBuilder
from lit_alignment.retrieval.files import Manifest
from lit_alignment.retrieval.index import IndexConfig
from tests.helpers.rewards import VowelReward

ROOT = Path(__file__).parents[2]
WORDS = "the kitchen scale does not work please reply order urgent billing product repair null true".split()
# Of decoders of any architecture.
DECODER_SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
DECODER_SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}


def chats(number: int, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    """Conversations of one to three exchanges with very unequal lengths."""
    generator = random.Random(seed)
    records = []
    for index in range(number):
        messages = []
        for _ in range(generator.randint(1, 3)):
            for role in ("user", "assistant"):
                length = generator.choice((1, 2, 5, longest))
                messages.append({"role": role, "content": " ".join(generator.choices(WORDS, k=length))})
        records.append({"id": f"r{index}", "messages": messages})
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def record(*turns: str, **rest: Any) -> Record:
    """A conversation that alternates user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return read_record({"messages": messages, **rest}, "test.jsonl:1", 0)


def table(tokenizer, example: Example) -> str:
    """The tokens of an example on one line, trained ones in [brackets]."""
    shown = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        text = tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "_")
        shown.append(text if label == IGNORE_INDEX else f"[{text}]")
    return " ".join(shown)


def encoder(tokenizer, template: TemplateConfig | None = None, **settings: Any) -> Encoder:
    return Encoder(tokenizer, EncodingConfig(template=template or TemplateConfig(), **settings))


def response_encoder(tokenizer, template: TemplateConfig | None = None, **settings: Any) -> ResponseEncoder:
    return ResponseEncoder(tokenizer, EncodingConfig(template=template or TemplateConfig(), **settings))


def base_model_folder(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> str:
    """A folder with a tiny base model and its tokenizer, as adapters need one."""
    torch.manual_seed(0)
    settings = AutoConfig.from_pretrained(ROOT / "configs/tiny", **config)
    AutoModelForCausalLM.from_config(settings).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(folder)
    return str(folder)


def sft_module(lora: bool = False, **settings: Any) -> SFTModule:
    seed_everything(0, verbose=False)
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    settings.setdefault("optimizer", OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0))
    return SFTModule(BackboneConfig("configs/tiny", weights="random"), peft=peft, **settings)


def sft_data(module: SFTModule, train: list[dict[str, Any]], val=None, **settings: Any) -> SFTDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    return SFTDataModule(
        module.tokenizer,
        train=[SourceConfig(records=train, name="train")],
        val=[SourceConfig(records=val, name="val")] if val else None,
        test=[SourceConfig(records=val, name="val")] if val else None,
        predict=[SourceConfig(records=val, name="val")] if val else None,
        **settings,
    )


def trainer(folder: Path, **settings: Any) -> Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "max_epochs": 1,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(**(options | settings))


class Seen(Callback):
    """Record ids and losses of each batch; optionally dies before a given one."""

    def __init__(self, die_at=None):
        self.ids, self.losses, self.die_at = [], [], die_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.die_at is not None and len(self.ids) == self.die_at:
            raise Killed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(batch.ids)
        self.losses.append(float(outputs["loss"]))


class Killed(Exception):
    pass


def weights(module: SFTModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


LABELS = ["bad", "fine", "good"]


def labelled(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Single messages of very unequal lengths, each with a label."""
    generator = random.Random(seed)
    records = []
    for index in range(number):
        text = " ".join(generator.choices(WORDS, k=generator.choice((1, 2, 5, 40))))
        message = {"role": "user", "content": text}
        records.append({"id": f"r{index}", "messages": [message], "label": LABELS[index % 3]})
    return records


def pairs(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preferences with prompts and responses of very unequal lengths."""
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.choice((1, 2, 5, 40))))

    return [
        {"id": f"r{i}", "prompt": text(), "chosen": f"{text()} yes", "rejected": f"{text()} no", "margin": 0.1 * i}
        for i in range(number)
    ]


def judged(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Responses judged alone, two good ones for each bad one."""
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.choice((1, 2, 5, 40))))

    return [{"id": f"r{i}", "prompt": text(), "completion": f"{text()} {i}", "label": i % 3 > 0} for i in range(number)]


def scoring_settings(path: str, lora: bool, settings: dict[str, Any]) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    backbone = BackboneConfig(path, weights="random" if path == "configs/tiny" else "pretrained")
    return {"backbone": backbone, "peft": peft, "optimizer": optimizer, **settings}


def classifier(path: str = "configs/tiny", lora: bool = False, **settings: Any) -> ClassificationModule:
    return ClassificationModule(**scoring_settings(path, lora, {"labels": LABELS, **settings}))


def reward_model(path: str = "configs/tiny", lora: bool = False, **settings: Any) -> RewardModule:
    return RewardModule(**scoring_settings(path, lora, settings))


def _sources(train, val) -> dict[str, Any]:
    given = {"train": train, "val": val, "test": val, "predict": val}
    return {name: [SourceConfig(records=records, name=name)] for name, records in given.items() if records}


def class_data(module: ClassificationModule, train=None, val=None, **settings: Any) -> ClassificationDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    labels = {"labels": module.labels, "problem": module.problem}
    return ClassificationDataModule(module.tokenizer, **labels, **_sources(train, val), **settings)


def reward_data(module: RewardModule, train=None, val=None, **settings: Any) -> RewardDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    return RewardDataModule(module.tokenizer, **_sources(train, val), **settings)


def preference_module(path: str = "configs/tiny", lora: bool = False, **settings: Any) -> PreferenceModule:
    return PreferenceModule(**scoring_settings(path, lora, settings))


def preference_data(module: PreferenceModule, train=None, val=None, **settings: Any) -> PreferenceDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    return PreferenceDataModule(module.tokenizer, **_sources(train, val), **settings)


def policy_module(path: str = "configs/tiny", lora: bool = False, **settings: Any) -> PolicyModule:
    settings.setdefault("rewards", [VowelReward()])
    return PolicyModule(**scoring_settings(path, lora, settings))


def policy_data(module: PolicyModule, train=None, val=None, **settings: Any) -> PolicyDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    return PolicyDataModule(module.tokenizer, **_sources(train, val), **settings)


def distillation_module(path: str = "configs/tiny", lora: bool = False, **settings: Any) -> DistillationModule:
    """Its teacher has other random weights."""
    settings.setdefault("teacher", BackboneConfig("configs/tiny", weights="random"))
    return DistillationModule(**scoring_settings(path, lora, settings))


def distillation_data(module: DistillationModule, train=None, val=None, **settings: Any) -> DistillationDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=256))
    return DistillationDataModule(module.tokenizer, **_sources(train, val), **settings)


def step_gradients(folder: Path, module, data, **options: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step."""
    captured = {}
    module.on_before_optimizer_step = lambda optimizer: captured.update(
        {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    )
    trainer(folder, max_steps=1, **options).fit(module, data)
    return captured


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def knowledge_index(config: IndexConfig, embeddings: torch.Tensor) -> Path:
    """An index with the given embeddings and passages p0, p1, ..."""
    manifest = Manifest({"path": "tiny", "pooling": "mean"}, "abc", embeddings.shape[1], config.dtype, len(embeddings))
    builder = IndexBuilder(config, manifest)
    builder.create([Passage(f"p{i}", f"title {i}", f"text of {i}") for i in range(len(embeddings))])
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0))
    for part in order.split(3):  # as several processes would, in any order
        builder.write(part.tolist(), embeddings[part])
    return builder.finish()


RETRIEVER = RetrieverConfig("configs/tiny", weights="random", temperature=0.1, towers="separate")


def knowledge(number: int, seed: int = 0) -> list[Passage]:
    """Passages of very unequal lengths."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=generator.choice((2, 5, 30)))) for _ in range(number)]
    return [Passage(f"p{i}", f"note {i}", text) for i, text in enumerate(texts)]


def encoded_index(
    folder: Path, passages: list[Passage], retriever: RetrieverConfig = RETRIEVER, **settings
) -> IndexConfig:
    """An index of passages as the retriever encodes them before any training."""
    config = IndexConfig(str(folder / "index"), **settings)
    encoder = load_retriever(retriever).eval()
    with torch.no_grad():
        written = [format_passage(retriever.passage_format, p.title, p.text) for p in passages]
        embeddings = encoder.passages(written)
    made_of = retriever.decides_passages(), weights_hash(encoder.passage_tower)
    builder = IndexBuilder(config, Manifest(*made_of, embeddings.shape[1], config.dtype, len(passages)))
    builder.create(passages)
    builder.write(range(len(passages)), embeddings)
    builder.finish()
    return config


def rag_module(
    index: IndexConfig, lora: bool = False, retriever: RetrieverConfig = RETRIEVER, **settings: Any
) -> RAGModule:
    return RAGModule(**scoring_settings("configs/tiny", lora, {"retriever": retriever, "index": index, **settings}))


def rag_data(module: RAGModule, train=None, val=None, **settings: Any) -> RAGDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    return RAGDataModule(module.tokenizer, **_sources(train, val), **settings)


VISION = EncoderConfig("configs/tiny_vision", weights="random", layer=-1)
IMAGE = ModalityConfig([VISION], ProjectorConfig("mlp"))


def picture(path: Path, seed: int) -> str:
    """A picture of two colors, with noise; one that is there stays, as another rank may read it."""
    if path.exists():
        return str(path)
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(0, 192, (2, 1, 3), generator=generator).repeat_interleave(torch.tensor([20, 20]), 0)
    pixels = (colors + torch.randint(0, 64, (40, 50, 3), generator=generator)).to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)


def seen(folder: Path, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with no to three images each, in any of their user messages."""
    generator = random.Random(seed)
    records = chats(number, seed)
    for index, record in enumerate(records):
        images = [
            picture(folder / f"{seed}-{index}-{i}.png", 97 * index + i) for i in range(generator.choice((0, 1, 1, 3)))
        ]
        for image in images:
            message = generator.choice([m for m in record["messages"] if m["role"] == "user"])
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            message["content"].insert(generator.randint(0, len(message["content"])), {"type": "image", "image": image})
    return records


def vlm_module(lora: bool = False, path: str = "configs/tiny", **settings: Any) -> VLMModule:
    return VLMModule(**scoring_settings(path, lora, {"image": IMAGE, **settings}))


def vlm_data(module: VLMModule, train=None, val=None, **settings: Any) -> VLMDataModule:
    settings.setdefault("encoding", EncodingConfig(max_length=512))
    return VLMDataModule(module.tokenizer, module.media, **_sources(train, val), **settings)


def generate(network, tokenizer, prompts, decoding, stop, **settings):
    """Completions of each prompt by the transformers engine, all in one batch."""
    requests = [Request(prompt, decoding, stop, seed=decoding.seed) for prompt in prompts]
    return TransformersEngine(network, tokenizer, len(prompts), **settings).generate(requests)
