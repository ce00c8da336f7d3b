"""Refreshing the index: what changes, what is kept, and that a resumed run continues as it would have."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment.callbacks.refresh import IndexRefresh
from lit_alignment.data.passages import format_passage
from lit_alignment.errors import ConfigError
from lit_alignment.models.dual_encoder import weights_hash
from lit_alignment.retrieval.index import PassageIndex
from tests.helpers import chats, encoded_index, knowledge, rag_data, rag_module, trainer


class Losses(Callback):
    def __init__(self):
        self.losses, self.hashes = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.hashes.append(pl_module.passage_retriever.index.manifest.encoder_hash)


def run(folder, callbacks, ckpt_path=None, **settings):
    module = rag_module(encoded_index(folder / "built", knowledge(9)), num_passages=3, train_retriever="both")
    runner = trainer(folder, callbacks=callbacks, **settings)
    runner.fit(module, rag_data(module, chats(8), batch_size=2), ckpt_path=ckpt_path)
    return module, runner


def test_new_index_holds_what_the_encoder_makes_now(tmp_path):
    module, _ = run(tmp_path, [IndexRefresh(every_n_steps=4)], max_steps=4)
    encoder, index = module.passage_retriever.encoder, module.passage_retriever.index
    assert index.manifest.step == 4 and index.manifest.encoder_hash == weights_hash(encoder.passage_tower)
    with torch.no_grad():
        expected = encoder.passages([format_passage("{title} {text}", p.title, p.text) for p in knowledge(9)])
    torch.testing.assert_close(index.shards[0], expected, rtol=1e-4, atol=1e-6)
    written = PassageIndex.load(tmp_path / "index/step-00000004")
    torch.testing.assert_close(written.shards[0], index.shards[0])


@pytest.mark.parametrize("background", [False, True])
def test_index_changes_at_the_asked_steps_and_the_last_ones_are_kept(background, tmp_path):
    losses = Losses()
    refresh = IndexRefresh(every_n_steps=2, background=background)
    _, runner = run(tmp_path / "run", [refresh, losses], max_epochs=3)
    assert len(set(losses.hashes)) >= 3
    if not background:
        assert [losses.hashes.index(each) for each in losses.hashes] == [0, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11]
        kept = sorted(path.name for path in (tmp_path / "run/index").glob("step-*"))
        assert kept == ["step-00000010", "step-00000012"]
        assert float(runner.callback_metrics["train/index_staleness"]) == 0


@pytest.mark.slow
def test_resumed_run_goes_on_with_its_index(tmp_path):
    whole = Losses()
    run(tmp_path / "whole", [IndexRefresh(every_n_steps=3), whole], max_epochs=2)
    first, rest = Losses(), Losses()
    saver = ModelCheckpoint(tmp_path / "part", filename="saved", every_n_train_steps=5, enable_version_counter=False)
    run(
        tmp_path / "part",
        [IndexRefresh(every_n_steps=3), first, saver],
        max_epochs=2,
        max_steps=5,
        enable_checkpointing=True,
    )
    saved = tmp_path / "part/saved.ckpt"
    run(tmp_path / "part", [IndexRefresh(every_n_steps=3), rest], ckpt_path=saved, max_epochs=2)
    assert first.losses + rest.losses == pytest.approx(whole.losses, rel=1e-5)
    assert first.hashes + rest.hashes == whole.hashes


def test_module_whose_passages_do_not_change_is_refused(tmp_path):
    module = rag_module(encoded_index(tmp_path, knowledge(9)), num_passages=3)
    with pytest.raises(ConfigError, match="train_retriever: both"):
        trainer(tmp_path, callbacks=[IndexRefresh()]).fit(module, rag_data(module, chats(4)))


class RowsAreKnown(Exception):
    """The rank has said which rows it sends."""


def test_rows_of_two_ranks_come_back_in_the_order_of_the_passages(tmp_path):
    """Rank r encodes passages r, r + 2, ...; of nine, the second rank has one less, and repeats the last."""
    module = rag_module(encoded_index(tmp_path, knowledge(9)), num_passages=3, train_retriever="both")
    retriever = module.passage_retriever
    encoder = retriever.load()
    torch.nn.init.normal_(encoder.passage_tower.get_input_embeddings().weight)
    with torch.no_grad():
        expected = encoder.passages([format_passage("{title} {text}", p.title, p.text) for p in knowledge(9)])
    sent = []

    def send(rows):
        sent.append(rows)
        raise RowsAreKnown

    def start(rank, all_gather):
        strategy = SimpleNamespace(all_gather=all_gather, barrier=lambda name: None)
        run = {"world_size": 2, "global_rank": rank, "global_step": 0, "is_global_zero": rank == 0, "loggers": []}
        IndexRefresh().on_fit_start(SimpleNamespace(strategy=strategy, **run), module)

    for rank in (0, 1):
        with pytest.raises(RowsAreKnown):
            start(rank, send)
    assert [len(rows) for rows in sent] == [5, 5]
    start(0, lambda rows: torch.stack(sent))
    torch.testing.assert_close(retriever.index.shards[0], expected, rtol=1e-4, atol=1e-6)
