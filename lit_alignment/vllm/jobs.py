"""What is asked of vLLM for each item of a method, and what its results say.

N sequences, K labels, T tokens, D width
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.checkpoints.restore import Saved, restore
from lit_alignment.data.batching.items import ItemBatch, PromptBatch
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.multimodal.media import open_image
from lit_alignment.data.vlm import MediaItem
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import Answer
from lit_alignment.models.head import base_model, scores_at
from lit_alignment.models.multimodal.placing import placed
from lit_alignment.modules.generative import GenerativeModule, Question
from lit_alignment.modules.retrieving import RetrievingModule
from lit_alignment.modules.scoring import ScoringModule
from lit_alignment.modules.vlm import VLMModule
from lit_alignment.vllm.engine import Request, Result, VLLMEngine, answers_of, sampling_parameters
from lit_alignment.vllm.model import Served

CHECKED = 16  # items whose scores are compared with transformers'
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest score, or of 1

Batches = Iterable[PromptBatch | ItemBatch]


@dataclass
class Finished:
    """What is known of one item.

    Args:
        name: The file that it belongs to.
        item: The item.
        prediction: What the file says of it.
        tokens: Tokens that were generated or read.
        problem: Why there is no prediction.
    """

    name: str
    item: Item
    prediction: dict[str, Any]
    tokens: int
    problem: str = ""


@dataclass
class Open:
    """An item whose requests are not all answered.

    Args:
        name: The file that it belongs to.
        item: The item.
        number: Of its requests.
        question: What is generated for it.
        results: By the request's number.
    """

    name: str
    item: Item
    number: int
    question: Question | None = None
    results: dict[int, Result] = field(default_factory=dict)


class Job:
    """Requests for items, and what becomes of their results."""

    def settings(self) -> dict[str, Any]:
        """What vLLM's engine must be told."""
        return {}

    def check(self, items: Sequence[Any], engine: VLLMEngine) -> None:
        """Compare the first items with what transformers makes of them, where numbers can be compared."""
        return

    @abstractmethod
    def requests(self, batches: Batches, writer: PredictionWriter) -> Iterator[Request]:
        """The requests of all items that a file lacks, each owned by an Open and its number."""

    @abstractmethod
    def finish(self, found: Open) -> tuple[dict[str, Any], int]:
        """An item's prediction and its number of tokens, once all its requests are answered."""

    def take(self, result: Result) -> Finished | None:
        """Add a result; when it is the last of its item's, what is known of that."""
        owner, place = result.request.owner
        owner.results[place] = result
        if len(owner.results) < owner.number:
            return None
        problem = next((each.problem for each in owner.results.values() if each.problem), "")
        prediction, tokens = ({}, 0) if problem else self.finish(owner)
        return Finished(owner.name, owner.item, prediction, tokens, problem)


# Answers.


class GenerationJob(Job):
    """Answers to prompts of token ids.

    Args:
        module: The method.
    """

    def __init__(self, module: GenerativeModule) -> None:
        """Keep the module."""
        self.module = module

    def prompt(self, item: Any, ids: list[int]) -> Any:
        """A prompt in one of vLLM's forms."""
        return {"prompt_token_ids": ids}

    def requests(self, batches: Batches, writer: PredictionWriter) -> Iterator[Request]:
        """Each question's prompts."""
        for batch in batches:
            for name, settings in self.module.generation.items():
                items = [item for item in batch.items if writer.wants(name, item)]
                questions = self.module.questions(items, settings) if items else []
                for item, question in zip(items, questions, strict=True):
                    owner = Open(name, item, len(question.prompts), question)
                    for place, ids in enumerate(question.prompts):
                        parameters = sampling_parameters(question.settings, self.module.stop, ids, self.module.never)
                        yield Request((owner, place), self.prompt(item, ids), parameters)

    def finish(self, found: Open) -> tuple[dict[str, Any], int]:
        """The response."""
        question = found.question
        assert question is not None
        answers: list[list[Answer]] = []
        for place, ids in enumerate(question.prompts):
            outputs = found.results[place].output.outputs
            parts = ids, self.module.tokenizer, question.settings, self.module.stop
            answers.append(answers_of(outputs, *parts))
        tokens = sum(answer.num_tokens for own in answers for answer in own)
        return self.module.prediction(question.finish(answers)), tokens


class PictureJob(GenerationJob):
    """Answers about images, which vLLM's own LLaVA encodes.

    Args:
        module: The method.
    """

    def __init__(self, module: VLMModule) -> None:
        """Keep the module."""
        super().__init__(module)
        self.vlm, self.image = module, module.media["image"]

    def settings(self) -> dict[str, Any]:
        """As many images a prompt as any has."""
        found = self.vlm.data.examples["predict"]["media"]
        most = max(len(json.loads(files)["image"]) for files in found)
        return {"limit_mm_per_prompt": {"image": max(1, most)}}

    def prompt(self, item: MediaItem, ids: list[int]) -> Any:
        """The images, and the ids with one placeholder for each."""
        files = item.media.get("image", [])
        if not files:
            return {"prompt_token_ids": ids}
        short = collapsed(ids, self.image.token_id, self.image.number)
        return {"prompt_token_ids": short, "multi_modal_data": {"image": [open_image(file) for file in files]}}


def collapsed(ids: Sequence[int], token_id: int, number: int) -> list[int]:
    """Ids with one placeholder where there are `number` for each image."""
    found, seen = [], 0
    for index in ids:
        if index != token_id or seen % number == 0:
            found.append(index)
        seen += index == token_id
    return found


class EmbeddingJob(GenerationJob):
    """Answers to prompts given as embeddings, in which those of media stand.

    Args:
        module: The method, its encoders and projectors loaded.
        network: Its language model, of which the embeddings are used.
    """

    def __init__(self, module: VLMModule, network: nn.Module) -> None:
        """Keep the parts."""
        super().__init__(module)
        self.vlm, self.network = module, network

    def settings(self) -> dict[str, Any]:
        """Prompts come as embeddings."""
        return {"enable_prompt_embeds": True}

    @torch.no_grad()
    def prompt(self, item: MediaItem, ids: list[int]) -> Any:
        """Embeddings of the tokens and of the media among them, [T, D]."""
        if not any(item.media.values()):
            return {"prompt_token_ids": ids}
        with placed(self.network, self.vlm.placements_of([item])):
            embedded = base_model(self.network).get_input_embeddings()(torch.tensor([ids]))[0]
        return {"prompt_embeds": embedded}


def generation_job(module: GenerativeModule, saved: Saved | None, served: Served) -> Job:
    """What is asked for a module's answers.

    Args:
        module: The method.
        saved: Its trained weights.
        served: What vLLM loads.

    Raises:
        ConfigError: If vLLM cannot do it.
    """
    if isinstance(module, RetrievingModule):
        if module.decoding not in ("concatenate", "rag_sequence_fast"):
            raise ConfigError(
                f"model.decoding: {module.decoding} needs the generator's own probabilities of other tokens than it "
                "has drawn. With engine: vllm use rag_sequence_fast or concatenate."
            )
        module.load_retriever()
        if saved is not None:
            module.encoder.load_state_dict(saved.retriever, strict=False)
        module.encoder.eval()
        module.check_index()
    if not isinstance(module, VLMModule):
        return GenerationJob(module)
    if saved is None:
        raise ConfigError("the projector is not trained: give --ckpt_path.")
    if json.loads((served.own / "config.json").read_text())["model_type"] == "llava":
        return PictureJob(module)
    print("no LLaVA: its prompts go to vLLM as embeddings")
    network, _ = restore(saved)
    module.model = network
    module.load_towers().load_state_dict(saved.towers, strict=False)
    module.eval()
    return EmbeddingJob(module, network)


# Scores.


class ScoringJob(Job):
    """Raw scores of sequences at their last tokens, compared with transformers' own on the first items.

    Args:
        module: The method.
        network: The same model in transformers.
    """

    def __init__(self, module: ScoringModule, network: nn.Module) -> None:
        """Keep the parts."""
        self.module, self.network = module, network
        (self.name,) = module.prediction_settings()

    def settings(self) -> dict[str, Any]:
        """A model that scores."""
        return {"runner": "pooling", "convert": "classify"}

    def requests(self, batches: Batches, writer: PredictionWriter) -> Iterator[Request]:
        """The sequences of each item."""
        for batch in batches:
            for item in batch.items:
                yield from self._requests(item)

    def _requests(self, item: Any) -> Iterator[Request]:
        from vllm import PoolingParams

        sequences = self.module.sequences(item)
        owner = Open(self.name, item, len(sequences))
        for place, ids in enumerate(sequences):
            raw = PoolingParams(task="classify", use_activation=False)
            yield Request((owner, place), {"prompt_token_ids": ids}, raw)

    def check(self, items: Sequence[Any], engine: VLLMEngine) -> None:
        """Compare raw scores with those of transformers in float32.

        Raises:
            ConfigError: If they differ by more than the engine's precision explains.
        """
        items, largest, scale = items[:CHECKED], 0.0, 1.0
        for result in engine.run(request for item in items for request in self._requests(item)):
            if result.problem:
                continue  # it is said of the item later
            expected = self._score(result.request.prompt["prompt_token_ids"])
            largest = max(largest, float((result.output.outputs.data.float() - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
        tolerance = TOLERANCE[engine.dtype] * scale
        if not largest <= tolerance:
            raise ConfigError(
                f"vLLM scores otherwise than transformers: a raw score of the first {len(items)} records differs by "
                f"{largest:.3g} (allowed is {tolerance:.3g}). Use engine: transformers, or another vllm.dtype."
            )
        print(f"raw scores of {len(items)} records differ from transformers' by at most {largest:.2g}")

    @torch.no_grad()
    def _score(self, ids: list[int]) -> Tensor:
        tensor = torch.tensor([ids])
        last = torch.tensor([len(ids) - 1])
        return scores_at(self.network, last, input_ids=tensor, attention_mask=torch.ones_like(tensor))[0]

    def finish(self, found: Open) -> tuple[dict[str, Any], int]:
        """What the scores say."""
        rows = [found.results[place].output for place in range(found.number)]
        scores = torch.stack([row.outputs.data.float() for row in rows])
        return self.module.predicted(found.item, scores), sum(len(row.prompt_token_ids) for row in rows)


def scoring_job(module: ScoringModule, saved: Saved | None) -> Job:
    """What is asked for a module's scores.

    Args:
        module: The method.
        saved: Its trained weights.
    """
    if saved is None:
        return ScoringJob(module, module.load_model().eval())
    if saved.head is not None:
        module.take_over(saved.head)
    return ScoringJob(module, restore(saved)[0])
