"""Tables whose records are split into training and validation: the same way on every rank, and after a resume."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import SFTDataModule
from lit_alignment.data.sources.records import SourceConfig
from tests.helpers import chats, sft_module, trainer
from tests.helpers.rank_runs import Recorder, strategy_of
from tests.helpers.ranks import run_on_ranks


def table(path):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "question", "answer", "note"])
        for record in chats(24):
            rows.writerow([record["id"], *(message["content"] for message in record["messages"][:2]), ""])
    return str(path)


def run(folder, kind, ranks):
    """An epoch; the first step of another one, and the rest of it."""
    found = {}
    for part in ("whole", "first", "rest"):
        module, recorder = sft_module(lora=True), Recorder()
        columns = {"id": "key", "prompt": "Answer: {question}", "completion": "answer"}
        source = SourceConfig(str(folder / "a.csv"), columns=columns)
        settings = {"packing": False, "batch_size": 2, "cache_dir": str(folder / f"cache-{kind}")}
        data = SFTDataModule(module.tokenizer, train=[source], val_fraction=0.25, **settings)
        saver = ModelCheckpoint(folder, filename=f"{kind}-saved", enable_version_counter=False, every_n_train_steps=1)
        runner = trainer(
            folder,
            strategy="auto" if kind == "one" else strategy_of(kind),
            devices=ranks,
            accumulate_grad_batches=4 // ranks,
            callbacks=[recorder, *([saver] if part == "first" else [])],
            enable_checkpointing=part == "first",
            max_steps=1 if part == "first" else -1,
        )
        runner.fit(module, data, ckpt_path=folder / f"{kind}-saved.ckpt" if part == "rest" else None)
        found[part] = {"ids": recorder.ids, "losses": recorder.losses, "held": data.examples["val"]["id"]}
        found[part]["validation"] = float(runner.callback_metrics.get("val/loss", torch.nan))
    torch.save(found, folder / f"{kind}-{runner.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_hold_the_same_records_of_a_table_out(tmp_path):
    table(tmp_path / "a.csv")
    run_on_ranks(run, tmp_path, "one", 1, ranks=1)
    one = torch.load(tmp_path / "one-0.pt")["whole"]
    assert len(one["held"]) == 6
    for kind in ("ddp", "fsdp2"):
        run_on_ranks(run, tmp_path, kind, 2)
        ranks = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in (0, 1)]
        trained = [name for rank in ranks for batch in rank["whole"]["ids"] for name in batch]
        assert sorted(set(trained) | {f"a/{name}" for name in one["held"]}) == sorted(f"a/r{i}" for i in range(24))
        assert not set(trained) & {f"a/{name}" for name in one["held"]}
        for rank in ranks:
            assert all(rank[part]["held"] == one["held"] for part in rank)
            assert rank["first"]["ids"] + rank["rest"]["ids"] == rank["whole"]["ids"]
            assert rank["whole"]["losses"] == pytest.approx(one["losses"], rel=1e-4)
            assert rank["rest"]["validation"] == pytest.approx(one["validation"], rel=1e-4)
