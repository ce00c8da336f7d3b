"""Fixed prompts, answered at each validation, side by side in one report."""

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_alignment.callbacks.report import CherryPick, render_report
from lit_alignment.callbacks.tables import log_table
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.prompts import PromptItem
from lit_alignment.data.records import Source
from lit_alignment.errors import ConfigError
from lit_alignment.generation.scoring import AnsweredPrompt, Scorer, read_documents
from lit_alignment.generation.settings import Answer, GenerationSettings
from lit_alignment.metrics.answers import build_metric
from lit_alignment.modules.generative import GenerativeModule


class CherryPicks(Callback):
    """Answer the same prompts before training and at each validation.

    Writes `cherry_picks.html` (self-contained; curves, and prompt, reference and the answers of each validation
    side by side) and `cherry_picks.jsonl` into the run's folder, and a table to the loggers that take one.

    Args:
        sources: Where the prompts come from; the validation sources by default.
        num_samples: Take the first so many of them.
        generation: How to answer.
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
        sources: list[Source] | None = None,
        num_samples: int = 4,
        generation: GenerationSettings = GenerationSettings(max_new_tokens=128),  # noqa: B008 - frozen
        batch_size: int = 8,
        every_n_validations: int = 1,
        before_training: bool = True,
        metrics: list[str] | None = None,
        reward_model: str | None = None,
    ) -> None:
        """Prompts are read when the fit starts."""
        self.metrics = ["exact_match"] if metrics is None else metrics
        self.reward_model = reward_model
        self._built = [build_metric(name) for name in self.metrics]
        self._scorer: Scorer | None = None
        self.sources, self.num_samples = sources, num_samples
        self.generation, self.batch_size = generation, batch_size
        self.every_n_validations, self.before_training = every_n_validations, before_training
        self.picks: list[CherryPick] = []
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._items: list[PromptItem] = []
        self._documents: list[list[str]] = []
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Encode the prompts."""
        if stage != "fit":
            return
        if not isinstance(pl_module, GenerativeModule):
            raise ConfigError(f"CherryPicks needs a module that answers prompts, not {type(pl_module).__name__}.")
        datamodule = datamodule_of(trainer)
        sources = self.sources or datamodule.sources["val"]
        if not sources:
            raise ConfigError("CherryPicks has no prompts: give it sources, or give data.val.")
        self._items = datamodule.predict_items(sources)[: self.num_samples]
        self._documents = [[] for _ in self._items]
        if "retrieval_utility" in self.metrics:
            self._documents = [_documents(item) for item in self._items]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a metric that this model cannot have, before any training."""
        if isinstance(pl_module, GenerativeModule):
            encoder = datamodule_of(trainer).encoder
            self._scorer = Scorer(self.metrics, encoder, pl_module.network, None, self.reward_model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer before the first step."""
        if self.before_training and trainer.global_step == 0:
            self._answer(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember the training loss."""
        loss = trainer.callback_metrics.get("train/loss")
        points = self.curves.setdefault("train/loss", [])
        if loss is not None and trainer.global_step > (points[-1][0] if points else 0):
            points.append((trainer.global_step, float(loss)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, and write the report."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        if math.isfinite(loss):
            self.curves.setdefault("val/loss", []).append((trainer.global_step, loss))
        if self._validations % self.every_n_validations == 0:
            self._answer(trainer, pl_module)

    def _answer(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, GenerativeModule) or self._scorer is None:
            return
        step = trainer.global_step
        answers: list[list[Answer]] = []
        # Every rank answers all prompts: sharded models hang if ranks make different numbers of calls.
        for start in range(0, len(self._items), self.batch_size):
            prompts = [item.input_ids for item in self._items[start : start + self.batch_size]]
            answers += module.answer(prompts, self.generation)
        asked = [(item.dataset, item.id) for item in self._items]
        if [(pick.dataset, pick.id) for pick in self.picks] != asked:  # a first run, or resumed with other prompts
            self.picks = [CherryPick(i.dataset, i.id, i.messages, i.reference) for i in self._items]
        scores = self._score(self._scorer, answers)
        for pick, found, values in zip(self.picks, answers, scores, strict=True):
            pick.answers[step], pick.scores[step] = found[0].content, values
        directory = trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero:
            self._write(Path(directory), step)
            names = [name for metric in self._built for name in metric.names if any(name in s for s in scores)]
            rows = [
                [p.messages[-1]["content"], p.reference or "", p.answers[step], *(p.scores[step].get(n) for n in names)]
                for p in self.picks
            ]
            log_table(trainer.loggers, "cherry_picks", ["prompt", "reference", "answer", *names], rows, step)
            # Every rank has all the answers, so nothing is gathered, and the other ranks are not waited for.
            means = {f"cherry_picks/{n}": v for metric in self._built for n, v in metric.means().items()}
            for logger in trainer.loggers:
                logger.log_metrics(means, step)

    def _score(self, scorer: Scorer, answers: list[list[Answer]]) -> list[dict[str, float]]:
        """Values of each prompt by name; the metrics then hold their means."""
        prompts = [
            AnsweredPrompt(
                messages=item.messages,
                answers=[answer.content for answer in found],
                finished=[answer.finish_reason == "stop" for answer in found],
                reference=item.reference,
                num_tokens=[answer.num_tokens for answer in found],
                documents=documents,
            )
            for item, documents, found in zip(self._items, self._documents, answers, strict=True)
        ]
        for metric in self._built:
            metric.reset()
        values = []
        for scored in scorer.score(prompts):
            for metric in self._built:
                metric.update(scored)
            values.append({name: v for metric in self._built for name, v in metric.values(scored).items()})
        return values

    def _write(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "cherry_picks.jsonl").open("a", encoding="utf-8") as file:
            for pick in self.picks:
                line = {
                    "step": step,
                    "dataset": pick.dataset,
                    "id": pick.id,
                    "messages": pick.messages,
                    "reference": pick.reference,
                    "answer": pick.answers[step],
                    "scores": pick.scores[step],
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        fresh = directory / ".cherry_picks.html.new"
        fresh.write_text(render_report(directory.name, self.curves, self.picks), encoding="utf-8")
        os.replace(fresh, directory / "cherry_picks.html")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same report."""
        return {
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "picks": [vars(pick) for pick in self.picks],
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's report."""
        self.curves = {name: [(int(s), float(v)) for s, v in points] for name, points in state_dict["curves"].items()}
        self.picks = [CherryPick(**pick) for pick in state_dict["picks"]]
        self._validations = state_dict["validations"]


def _documents(item: PromptItem) -> list[str]:
    meta = item.meta if isinstance(item.meta, dict) else {}
    return read_documents(meta.get("documents"), f"{item.dataset}, record {item.id}")
