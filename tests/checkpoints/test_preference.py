"""A resumed preference optimisation has the same further losses and the same weights as one that was never stopped."""

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import AdapterConfig, LossConfig
from lit_alignment.models.adapters import save_adapter
from tests.helpers import (
    Seen,
    base_model_folder,
    judged,
    pairs,
    preference_data,
    preference_module,
    reward_data,
    reward_model,
    trainer,
    weights,
)
from tests.helpers.ranks import run_on_ranks

CASES = {
    "adapters off": {"lora": True},
    "cached": {"reference": "cached"},
    "copy": {"reference": "frozen_copy"},
    "second adapter": {"adapter": True},
    "kto": {"losses": [LossConfig("kto")]},
    "kto pairs": {"losses": [LossConfig("kto_pair")], "lora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and an adapter on it that was trained a little."""
    folder = tmp_path_factory.mktemp("models")
    module = preference_module(base_model_folder(folder / "base"), lora=True)
    trainer(folder, max_steps=3).fit(module, preference_data(module, pairs(6)))
    save_adapter(module.network, folder / "adapter")
    return folder


def fit(folder, case, resume=None, callbacks=(), accumulate=2, ranks=1, **settings):
    """Losses, validations and weights of a run."""
    given = dict(CASES[case])
    if given.pop("adapter", False):
        given["adapter"] = AdapterConfig(str(folder / "adapter"), trainable=True)
    module = preference_module(str(folder / "base"), **given)
    records = judged if case == "kto" else pairs
    shape = {"packing": False, "batch_size": 2, "cache_dir": str(folder / "cache")} | settings
    kind = "outcomes" if case == "kto" else "preferences"
    data = preference_data(module, records(14), records(5, 1), kind=kind, **shape)
    seen = Seen()
    run = trainer(
        folder,
        callbacks=[seen, *callbacks],
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=bool(callbacks),
        log_every_n_steps=1,
        **({} if ranks == 1 else {"devices": ranks, "strategy": "ddp"}),
    )
    run.fit(module, data, ckpt_path=resume)
    return seen, {name: float(value) for name, value in run.callback_metrics.items()}, weights(module)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resume_in_the_middle_of_an_epoch_is_exact(folder, tmp_path, case):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole, values, expected = fit(folder, case, callbacks=[saver])
    rest, resumed, found = fit(folder, case, resume=tmp_path / "step=2.ckpt")
    assert len(rest.losses) == len(whole.losses) - 4 and rest.losses == whole.losses[4:]
    assert rest.ids == whole.ids[4:]
    assert resumed == values
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"batch_size": 3}, {"packing": True, "tokens_per_batch": 512}, {"accumulate": 3}])
@pytest.mark.parametrize("case", ["cached", "kto"])
def test_resume_with_other_batches_trains_each_record_once(folder, tmp_path, case, other):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole, _, _ = fit(folder, case, callbacks=[saver])
    rest, _, _ = fit(folder, case, resume=tmp_path / "step=2.ckpt", **other)
    trained = sorted(name for ids in (*whole.ids[:4], *rest.ids) for name in ids)
    assert trained == sorted(f"train/r{number}" for number in range(14) for _ in range(2))


def resumed_on_rank(folder, case, path):
    rest, values, _ = fit(folder, case, resume=path, ranks=2, accumulate=1)
    torch.save((rest.ids, values), path.parent / f"{os.environ['RANK']}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cached", "kto"])
def test_resume_on_more_ranks_goes_on_with_the_same_steps(folder, tmp_path, case):
    """Each rank takes one of the two micro-batches of a step."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole, values, _ = fit(folder, case, callbacks=[saver])
    run_on_ranks(resumed_on_rank, folder, case, tmp_path / "step=2.ckpt")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [name for step in zip(*(ids for ids, _ in ranks), strict=True) for ids in step for name in ids][:6] == [
        name for ids in whole.ids[4:7] for name in ids
    ]
    for _, found in ranks:
        assert found == pytest.approx(values, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["preferences", "outcomes", "reward"])
def test_padded_and_packed_rows_are_of_the_same_data(kind, share):
    """What a checkpoint says of its data, so that a run may be resumed with rows of the other kind."""
    found = []
    for packing in (True, False):
        if kind == "reward":
            module = reward_model()
            data = reward_data(module, pairs(8), packing=packing, share_prompts=share)
        else:
            module = preference_module(losses=[LossConfig("kto" if kind == "outcomes" else "sigmoid")])
            data = preference_data(module, pairs(8), packing=packing, share_prompts=share, kind=kind)
        data.setup("fit")
        found.append(data._identity)
    assert found[0] == found[1]
