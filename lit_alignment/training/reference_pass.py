"""Log-probabilities under the reference, computed once and kept in the data cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
import xxhash
from datasets.utils import tqdm
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import all_gather_object, get_world_size, is_initialized
from transformers import PreTrainedModel

from lit_alignment.data.base import Split
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.examples import column
from lit_alignment.data.planned import data_rank
from lit_alignment.data.preference import PreferenceBatch, PreferenceDataModule
from lit_alignment.data.sources.cache import cached_rows, fingerprint
from lit_alignment.data.sources.content import content_hash
from lit_alignment.data.sources.record_batches import CachedFile, CachedRows, joined
from lit_alignment.errors import CacheError
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.paths import local_path

FEATURES = datasets.Features({"logps": datasets.List(datasets.Value("float32"))})
PART = 1024  # examples in a file: what a kill loses of the pass at most
ENCODED = ("prompt", "responses", "trained")  # columns that decide log-probabilities


def made_of(
    backbone: BackboneConfig, adapter: AdapterConfig | None, random_state: Tensor | None, folder: Path
) -> list[Any]:
    """What decides the weights of a model before training.

    Args:
        backbone: The pretrained model.
        adapter: An adapter that it starts with.
        random_state: Of the generator that new weights were drawn from; None if all are from files.
        folder: Where contents of files are remembered.
    """
    found: list[Any] = [backbone.revision, backbone.dtype, backbone.quantization]
    for path in (local_path(backbone.path), None if adapter is None else adapter.path):
        if path is not None and Path(path).expanduser().is_dir():
            files = (*Path(path).expanduser().glob("*.safetensors"), *Path(path).expanduser().glob("*config.json"))
            found.append([(file.name, content_hash(file, folder)) for file in sorted(files)])
        else:
            found.append(path)  # on the hub; the revision is a commit
    return [*found, None if random_state is None else xxhash.xxh3_128_hexdigest(random_state.numpy().tobytes())]


def cached_reference(
    trainer: Trainer,
    data: PreferenceDataModule,
    split: Split,
    weights: list[Any],
    model: PreTrainedModel,
    reference: Callable[[], AbstractContextManager[Callable[[PreferenceBatch], Tensor]]],
) -> CachedRows:
    """Log-probabilities of all targets of a split's examples, from the cache or computed now, on all ranks together.

    Chats have none: they stand at position -1.

    Args:
        trainer: Runs the strategy under which they are computed.
        data: Has the examples.
        split: Which ones.
        weights: What decides the reference's weights.
        model: The language model, for its precision and attention.
        reference: Surrounds the pass, and gives what computes the log-probabilities of a batch.
    """
    examples = data.examples[split]
    judged = np.flatnonzero(column(examples, "weight"))
    # A record that is repeated is computed once.
    _, firsts, numbers = np.unique(examples.positions[judged], return_index=True, return_inverse=True)
    firsts = judged[firsts]
    versions = [torch.__version__, transformers.__version__]
    computed = [str(trainer.precision), str(model.dtype), model.config._attn_implementation, *versions]
    key = fingerprint(weights, computed, _content(examples, firsts))
    paths = [data.cache_dir / f"reference-{key}-{start}.arrow" for start in range(0, len(firsts), PART)]
    missing = [number for number, path in enumerate(paths) if _any_rank(trainer, not _is_whole(path))]
    if missing:
        rank_zero_info(
            f"reference: computing log-probabilities of {len(firsts)} examples of {split}, kept in the cache"
        )
        with reference() as logps:
            for number in tqdm(missing, f"Reference {split}", unit="part", disable=not trainer.is_global_zero):
                rows = _rows(trainer, data, split, firsts[number * PART : (number + 1) * PART], logps)
                if trainer.local_rank == 0:
                    cached_rows(paths[number], partial(iter, rows), FEATURES, ["logps"])
                trainer.strategy.barrier("reference")
    found = joined([CachedRows(FEATURES.arrow_schema, [file], _all_of(file)) for file in map(CachedFile, paths)])
    found.positions = np.full(len(examples), -1)
    found.positions[judged] = numbers
    return found


def _rows(
    trainer: Trainer,
    data: PreferenceDataModule,
    split: Split,
    indices: NDArray[np.int64],
    logps: Callable[[PreferenceBatch], Tensor],
) -> list[dict[str, Any]]:
    """Rows of FEATURES of some examples, which the ranks compute together."""
    examples = data.examples[split]
    plan = BatchPlan(
        lengths=column(examples, "length")[indices],
        weights=np.ones(len(indices)),
        tokens_per_batch=data.tokens_per_batch if data.packing else None,
        batch_size=data.batch_size,
        shuffle=False,
        seed=0,
    )
    found: dict[int, list[float]] = {}
    for planned in plan.batches(plan.groups(0), *data_rank(trainer)):
        own = [int(indices[index]) for index in planned.indices]
        batch = trainer.strategy.batch_to_device(data.collate(examples.rows(own), PlannedBatch(own, 0.0)))
        with trainer.precision_plugin.forward_context():
            values = logps(batch).float().cpu()
        lengths = iter(torch.split(values, batch.lengths))
        for index, responses in zip(planned.indices, batch.groups, strict=True):
            found[index] = torch.cat([next(lengths) for _ in range(responses)]).tolist()
    if is_initialized():
        gathered: list[dict[int, list[float]]] = [{}] * get_world_size()
        all_gather_object(gathered, found)
        found = {index: values for own in gathered for index, values in own.items()}
    return [{"logps": found[index]} for index in range(len(indices))]


def _content(examples: CachedRows, firsts: NDArray[np.int64]) -> str:
    """A hash of the encoded examples, in their order."""
    digest = xxhash.xxh3_128()
    for name in ENCODED:
        values: Any = examples.column(name).take(pa.array(firsts))
        while pa.types.is_list(values.type):
            digest.update(np.asarray(pc.list_value_length(values)).tobytes())
            values = pc.list_flatten(values)
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        CachedFile(path).columns("logps")
    except CacheError as error:
        rank_zero_info(f"{error} Computing them again now.")
        return False
    return True


def _any_rank(trainer: Trainer, value: bool) -> bool:
    told = torch.tensor(float(value), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(told, reduce_op="sum")) > 0


def _all_of(file: CachedFile) -> NDArray[np.int64]:
    return np.arange(sum(map(len, file.batches)))
