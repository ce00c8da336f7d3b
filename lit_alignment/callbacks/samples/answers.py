"""Fixed prompts, answered at each validation, side by side in one report."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_alignment.callbacks.samples.base import PickReport
from lit_alignment.data.conversation import conversations_of
from lit_alignment.data.encoding.prompts import PromptItem
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.evaluation.answers import build_metric
from lit_alignment.evaluation.scoring import AnsweredPrompt, Scorer, read_documents
from lit_alignment.generation.engine import Completion
from lit_alignment.generation.reward_scorer import RewardScorer
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.modules.base import alignment_module


class CherryPicks(PickReport):
    """Answer the same prompts before training and at each validation.

    Writes `report.html` (self-contained; curves, and prompt, reference and the answers of each validation side by
    side) and `cherry_picks.jsonl` into the run's folder, and a table to the loggers that take one.

    Args:
        sources: Where the prompts come from; the validation sources by default.
        num_samples: Take the first so many of them.
        generation: The decoding configuration.
        batch_size: Prompts to answer together.
        every_n_validations: Answer at every n-th validation only.
        before_training: Also answer before the first step.
        metrics: Names of metrics of the answers: `exact_match` (the default), `length`, `distinct`, `diversity`,
            `self_bleu`, `rouge`, `perplexity`, `kl` (to the model without its adapters), `reward`,
            `retrieval_utility` (of `meta.documents`). Means go to the loggers as `cherry_picks/NAME`.
        reward_model: Folder of the reward model, for `reward`.
    """

    def __init__(
        self,
        sources: list[SourceConfig] | None = None,
        num_samples: int = 4,
        generation: DecodingConfig = DecodingConfig(max_new_tokens=128),  # noqa: B008 - frozen
        batch_size: int = 8,
        every_n_validations: int = 1,
        before_training: bool = True,
        metrics: list[str] | None = None,
        reward_model: str | None = None,
    ) -> None:
        """Prompts are read when the fit starts."""
        super().__init__(sources, num_samples, batch_size, every_n_validations, before_training)
        self.metrics = ["exact_match"] if metrics is None else metrics
        self.reward_model = reward_model
        self.generation = generation
        self._built = [build_metric(name) for name in self.metrics]
        self._scorer: Scorer | None = None
        self._documents: list[list[str]] = []

    def check(self, module: LightningModule) -> None:
        """Refuse a module that answers no prompts."""
        alignment_module(module).respond([], self.generation)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Encode the prompts."""
        super().setup(trainer, pl_module, stage)
        self._documents = [_documents(item) if "retrieval_utility" in self.metrics else [] for item in self.items]

    def known(self, item: PromptItem) -> dict[str, str | None]:
        """The answer that the record has."""
        return {"reference": item.reference}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a metric that this model cannot have, before any training."""
        path = self.reward_model if "reward" in self.metrics else None
        reward = None if path is None else RewardScorer(path)
        network = alignment_module(pl_module).network
        self._scorer = Scorer(self.metrics, conversations_of(trainer).encoder, network, None, reward)

    def show(self, trainer: Trainer, module: LightningModule, step: int) -> tuple[list[str], list[list[Any]]]:
        """Answer the prompts."""
        if self._scorer is None:
            return [], []
        asked = alignment_module(module)
        batches = [self.items[start : start + self.batch_size] for start in range(0, len(self.items), self.batch_size)]
        responses = [response for batch in batches for response in asked.respond(batch, self.generation)]
        answers = [response.completions for response in responses]
        scores = self._score(self._scorer, answers)
        for pick, response, values in zip(self.picks, responses, scores, strict=True):
            text = response.completions[0].text
            pick.answers[step], pick.scores[step] = text, values
            if "documents" in response.retrieved:
                pick.documents[step] = _retrieved(response.retrieved)
            reference = pick.known["reference"]
            if reference is not None:
                pick.right[step] = text.strip() == reference.strip()
        names = [name for metric in self._built for name in metric.names if any(name in s for s in scores)]
        rows = [
            [
                p.messages[-1]["content"],
                p.known["reference"] or "",
                p.answers[step],
                *(["\n".join(p.documents[step])] if step in p.documents else []),
                *(p.scores[step].get(n) for n in names),
            ]
            for p in self.picks
        ]
        retrieved = ["documents"] if any(step in pick.documents for pick in self.picks) else []
        return ["prompt", "reference", "answer", *retrieved, *names], rows

    def means(self) -> dict[str, float]:
        """Means of the metrics."""
        return {f"cherry_picks/{n}": v for metric in self._built for n, v in metric.means().items()}

    def _score(self, scorer: Scorer, answers: list[list[Completion]]) -> list[dict[str, float]]:
        """Values of each prompt by name; the metrics then hold their means."""
        prompts = [
            AnsweredPrompt(
                messages=item.messages,
                answers=[completion.text for completion in found],
                finished=[completion.finish_reason == "stop" for completion in found],
                reference=item.reference,
                num_tokens=[completion.num_tokens for completion in found],
                documents=documents,
            )
            for item, documents, found in zip(self.items, self._documents, answers, strict=True)
        ]
        for metric in self._built:
            metric.reset()
        values = []
        for scored in scorer.score(prompts):
            for metric in self._built:
                metric.update(scored)
            values.append({name: v for metric in self._built for name, v in metric.values(scored).items()})
        return values


def _retrieved(found: dict[str, Any]) -> list[str]:
    """A line for each document: its score, and its title or where its text begins."""
    documents = zip(found["documents"], found["doc_scores"], strict=True)
    return [f"{score:.2f}  {document['title'] or document['text'][:60]}" for document, score in documents]


def _documents(item: PromptItem) -> list[str]:
    meta = item.meta if isinstance(item.meta, dict) else {}
    return read_documents(meta.get("documents"), f"{item.dataset}, record {item.id}")
