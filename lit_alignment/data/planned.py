"""The batches of a training, and where in them it stands."""

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import Rows, filled
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.batching.position import (
    Begun,
    Window,
    epoch_length,
    identity,
    read_position,
    refuse_other_data,
    update_position,
    write_position,
)
from lit_alignment.data.batching.standing import accumulation, standing
from lit_alignment.data.examples import column
from lit_alignment.data.sources.record_batches import CachedRows
from lit_alignment.errors import ConfigError


def data_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Whose batches a process trains on, and the number of those who have different ones."""
    given = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if given is None else (given["rank"], given["num_replicas"])


class PlannedDataModule(LightningDataModule):
    """Loaders that follow a plan, and go on in it after a resume.

    Attributes:
        examples: Encoded examples of each split.
        num_workers: Processes that build batches ahead.
        seed: Seed of every order.
        tokenizer: The model's.
        tokens_per_batch: Tokens of a packed row.
        fills_rows: Whether packed rows are filled up to that length, as a compiled model asks.
    """

    examples: dict[str, CachedRows]
    num_workers: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int
    fills_rows = False

    def __init__(self) -> None:
        """Nothing has been trained."""
        super().__init__()
        self._train_loader: PlannedLoader[Any] | None = None
        self._train_plan: BatchPlan | None = None
        self.begun = Begun(0)  # the epoch in which a resumed training stands

    def begin(self) -> None:
        """Forget where an earlier run stood, and what its data were."""
        self._train_plan, self.begun = None, Begun(0)
        self.__dict__.pop("_identity", None)

    @abstractmethod
    def plan(self, split: Any) -> BatchPlan:
        """What decides the batches of a split that is loaded."""

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> Any:
        """Tensors of one batch."""

    def train_dataloader(self) -> PlannedLoader[Any]:
        """Shuffled batches that know the trained weight of their optimizer step."""
        self._train_loader = self._loader("train")
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for a checkpoint: what stands behind the last optimizer step."""
        if self._train_loader is None or self.trainer is None:
            return {}
        at = standing(self.trainer)
        position = write_position(
            self._training_plan(), at, self._begun(at.epoch), self._window(at.epoch), self.trainer.global_step
        )
        return {"train": position, "data": self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a checkpoint's position; sharded strategies restore when the loader is there already.

        Raises:
            CheckpointError: If it was trained on other data, or in another order.
        """
        if self.trainer is None or self.trainer.state.fn != "fit" or "train" not in state_dict:
            return
        if "data" in state_dict:  # earlier versions did not write it
            refuse_other_data(state_dict["data"], self._identity)
        self.begun = read_position(
            self._training_plan(), state_dict["train"], self._window(state_dict["train"]["epoch"])
        )
        limit = self.trainer.limit_train_batches
        if self.begun.changed and limit != 1.0:
            raise ConfigError(
                f"trainer.limit_train_batches is {limit}, and the checkpoint's epoch was begun with other batches "
                f"({', '.join(self.begun.changed)}). Resume with the same batches until the epoch ends, or without the "
                "limit."
            )

    def update_checkpoint(self, checkpoint: dict[str, Any], stored: dict[str, Any]) -> None:
        """Bring a checkpoint of an earlier version into today's form; `stored` is the data module's part of it."""
        epoch = stored["train"]["epoch"]
        update_position(checkpoint, stored, self._training_plan(), self._window(epoch))

    def epoch_length(self, epoch: int) -> int:
        """Micro-batches of each rank in an epoch, within `limit_train_batches`."""
        length = epoch_length(self._training_plan(), self._begun(epoch), data_rank(self.trainer)[1])
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(length, limit) if isinstance(limit, int) else int(length * limit)

    def _training_plan(self) -> BatchPlan:
        if self._train_plan is None:
            self._train_plan = self.plan("train")
        return self._train_plan

    def _begun(self, epoch: int) -> Begun:
        return self.begun if self.begun.epoch == epoch else Begun(epoch)

    def _window(self, epoch: int) -> Window:
        accumulate = 1 if self.trainer is None else accumulation(self.trainer, epoch)
        return Window(data_rank(self.trainer)[1], accumulate)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        dataset = self.examples["train"]
        ids = dataset.column("id")
        return identity(column(dataset, "length"), column(dataset, "weight"), ids, self.seed)

    def _loader(self, split: str) -> PlannedLoader[Any]:
        dataset, plan = self.examples[split], self._training_plan() if split == "train" else self.plan(split)
        rank, ranks = data_rank(self.trainer)

        def batches(epoch: int) -> list[PlannedBatch]:
            if split != "train":
                return plan.batches(plan.groups(0), rank, ranks)
            begun = self._begun(epoch)
            # A limit cuts the last window short, so the plan has to know it.
            groups = plan.left(epoch, begun.stretches)[: (self.epoch_length(epoch) - begun.batches) * ranks]
            return plan.batches(groups, rank, ranks, self._window(epoch).accumulate)

        build = partial(self._batch, dataset)
        pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        begun = Begun(0)
        if split == "train" and self.trainer is not None:
            begun = self._begun(max(self.begun.epoch, self.trainer.current_epoch))
        return PlannedLoader(batches, build, epoch_length(plan, begun, ranks), self.num_workers, pin_memory)

    def _batch(self, rows: CachedRows, planned: PlannedBatch) -> Any:
        batch = self.collate(rows.rows(planned.indices), planned)
        if not isinstance(batch, Rows):
            return batch
        batch = replace(batch, window_share=planned.share)
        return filled(batch, self.tokens_per_batch, int(self.tokenizer.pad_token_id or 0)) if self.fills_rows else batch

    def __getstate__(self) -> dict[str, Any]:
        """What workers need that are not forked: all but the Trainer and what belongs to it."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_train_loader", "answered")}
        return kept | {"trainer": None, "_train_loader": None, "answered": set}
