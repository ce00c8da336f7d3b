"""Preference optimisation on two gloo ranks is that of one process, whichever way the reference is held."""

from functools import cache

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from lit_alignment import AdapterConfig, FSDP2Strategy, LossConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import save_adapter
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import base_model_folder, chats, judged, pairs, preference_data, preference_module, trainer
from tests.helpers.deepspeed_on_cpu import DeepSpeedOnCPU
from tests.helpers.rank_runs import Recorder, full
from tests.helpers.ranks import run_on_ranks

REFERENCES = {
    "adapters off": {"lora": True},
    "copy": {"reference": "frozen_copy"},
    "second adapter": {"adapter": True},
    "cached": {"reference": "cached"},
    "cached beside chats": {"reference": "cached", "chat_weight": 0.5},
}
MORE = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("tensor", "zero1", "zero2")]
KTO = {"kto adapters off": {"lora": True}, "kto copy": {}, "kto copy beside chats": {"chat_weight": 0.5}}


def strategy_of(kind):
    if kind.startswith("zero"):
        return DeepSpeedOnCPU(int(kind[-1]))
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "one":
        return "auto"
    sizes = {f"{name}_parallel_size": 2 for name in ("sequence", "tensor") if name == kind}
    return FSDP2Strategy(process_group_backend="gloo", **sizes)


def built(folder, case, kind):
    """Module and data of a case."""
    settings = dict((REFERENCES | KTO)[case])
    if settings.pop("adapter", False):
        settings["adapter"] = AdapterConfig(str(folder / "adapter"), trainable=True)
    of_responses = case.startswith("kto")
    module = preference_module(
        str(folder / "base"),
        losses=[LossConfig("kto" if of_responses else "sigmoid", beta=0.5)],
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant", warmup=0),
        **settings,
    )
    records = (judged(40), judged(9, 1)) if of_responses else (pairs(31), pairs(5, 1))
    shape = {"tokens_per_batch": 512, "cache_dir": str(folder / f"cache-{kind}")}
    if case.endswith("chats"):
        shape["chats"] = [SourceConfig(records=chats(16, longest=60), name="chats")]
    return module, preference_data(module, *records, kind="outcomes" if of_responses else "preferences", **shape)


def reference_logps(module, data):
    """Log-probabilities of the validation's targets under the reference, by record."""
    found = {}
    for batch in data.val_dataloader():
        batch = module.trainer.strategy.batch_to_device(batch)
        values = iter(torch.split(module.judged_logps(batch), batch.lengths))
        for name, number in zip(batch.ids, batch.groups, strict=True):
            found[name] = torch.cat([next(values) for _ in range(number)])
    return found


class FirstReference(Callback):
    """Keeps what the reference says before training."""

    def on_train_start(self, trainer, pl_module):
        self.logps = reference_logps(pl_module, trainer.datamodule)


def train_all(folder, kind, cases):
    """One case after the other in the same processes."""
    for case in cases:
        recorder = Recorder()
        alone = kind in ("one", "sequence", "tensor")  # all ranks have the same batches
        run = trainer(
            folder,
            strategy=strategy_of(kind),
            devices=1 if kind == "one" else 2,
            accumulate_grad_batches=4 if alone else 2,
            max_epochs=2,
            log_every_n_steps=1,
            callbacks=[recorder],
        )
        module, data = built(folder, case, kind)
        first = FirstReference()
        run.callbacks.append(first)
        run.fit(module, data)
        after = reference_logps(module, data)
        keep = {
            "gradients": recorder.gradients,
            "losses": recorder.losses,
            "norms": recorder.norms,
            "values": {name: float(full(value)) for name, value in run.callback_metrics.items()},
            "reference": after,
            "unchanged": all(torch.equal(values, first.logps[name]) for name, values in after.items()),
        }
        torch.save(keep, folder / f"{kind}-{case}-{run.global_rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a case found under a strategy; all cases of one share a launch."""
    folder = tmp_path_factory.mktemp("preferences")
    base = base_model_folder(folder / "base")
    module = preference_module(base, lora=True)
    trainer(folder, max_steps=3).fit(module, preference_data(module, pairs(6)))
    save_adapter(module.network, folder / "adapter")

    @cache
    def launch(kind):
        cases = [*REFERENCES, *(KTO if kind in ("one", "ddp", "fsdp2") else ())]
        run_on_ranks(train_all, folder, kind, cases, ranks=1 if kind == "one" else 2)

    def found(kind, case):
        launch(kind)
        return [torch.load(folder / f"{kind}-{case}-{rank}.pt") for rank in range(1 if kind == "one" else 2)]

    return found


def assert_same(one, ranks):
    assert len(one["losses"]) > 3 and "val/loss" in one["values"] and one["unchanged"]
    seen = {}
    for two in ranks:
        assert two["unchanged"]
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
        for found, expected in zip(two["gradients"], one["gradients"], strict=True):
            assert found.keys() in (expected.keys(), set())  # DeepSpeed keeps them to itself
            for name, gradient in found.items():
                atol = 1e-4 * float(expected[name].abs().max()) + 1e-6
                torch.testing.assert_close(gradient, expected[name], rtol=0, atol=atol)
        assert two["values"].keys() == one["values"].keys()
        for name, value in one["values"].items():
            assert two["values"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        seen |= two["reference"]
    assert seen.keys() == one["reference"].keys()
    for name, values in one["reference"].items():
        torch.testing.assert_close(seen[name], values, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "sequence", "zero3", *MORE])
def test_two_ranks_train_beside_a_reference_as_one_process(kind, case, trained):
    """Losses, gradients, all that is logged, and the reference, which three steps leave as it was."""
    assert_same(trained("one", case)[0], trained(kind, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", KTO)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_estimate_and_train_kto_as_one_process(kind, case, trained):
    assert_same(trained("one", case)[0], trained(kind, case))


def refused(folder):
    module, data = built(folder, "kto copy", "sequence")
    with pytest.raises(ConfigError, match="kto cannot share rows between ranks"):
        trainer(folder, strategy=strategy_of("sequence"), devices=2, max_steps=1).fit(module, data)


@pytest.mark.slow
def test_kto_is_refused_where_ranks_share_rows(tmp_path):
    base_model_folder(tmp_path / "base")
    run_on_ranks(refused, tmp_path)
