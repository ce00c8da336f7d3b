"""A reference that follows the policy: what it is at each step, in checkpoints, in exports, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig

from lit_alignment import AdapterConfig, DecodingConfig, FSDP2Strategy, LossConfig, ReferenceSyncConfig
from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import save_adapter
from lit_alignment.models.reference import COPY, adapter_weights, add_reference, mix_into, model_weights, quiet_logps
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import Seen, base_model_folder, pairs, preference_data, preference_module, trainer
from tests.helpers.deepspeed_on_cpu import DeepSpeedOnCPU
from tests.helpers.rank_runs import full
from tests.helpers.ranks import run_on_ranks

KINDS = ("full", "new adapter", "continued adapter")
FAST = OptimizerConfig(learning_rate=5e-3, schedule="constant", warmup=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and an adapter that was trained a little."""
    path = tmp_path_factory.mktemp("models")
    module = preference_module(base_model_folder(path / "base"), lora=True)
    trainer(path, max_steps=3).fit(module, preference_data(module, pairs(6)))
    save_adapter(module.network, path / "adapter")
    return path


def following(folder, kind, mix=1.0, every=2, **settings):
    if kind == "continued adapter":
        settings["adapter"] = AdapterConfig(str(folder / "adapter"), trainable=True)
    sync = ReferenceSyncConfig(every, mix)
    return preference_module(
        str(folder / "base"), kind == "new adapter", reference_sync=sync, optimizer=FAST, **settings
    )


def of_both(module):
    """Policy and reference, weight by weight."""
    copied = module.reference_model
    found = adapter_weights(module.network) if copied is None else model_weights(module.network, copied)
    return [(full(own).detach().clone(), full(kept).detach().clone()) for own, kept in found]


class EachStep(Callback):
    """Keeps policy and reference before training and behind each step, as checkpoints see them."""

    def on_train_start(self, trainer, pl_module):
        self.steps = [of_both(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append(of_both(pl_module))


@pytest.mark.parametrize("mix", [1.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_mixed_with_the_policy_every_n_steps(tmp_path, folder, kind, mix):
    module, each = following(folder, kind, mix), EachStep()
    data = preference_data(module, pairs(12), batch_size=2, packing=False)
    trainer(tmp_path, max_steps=5, accumulate_grad_batches=2, max_epochs=-1, callbacks=[each]).fit(module, data)
    expected = [own.double() for own, _ in each.steps[0]]  # both begin alike
    for step, weights in enumerate(each.steps):
        if step in (2, 4):
            expected = [mix * own.double() + (1 - mix) * kept for (own, _), kept in zip(weights, expected, strict=True)]
        for (_, kept), value in zip(weights, expected, strict=True):
            torch.testing.assert_close(kept, value.float(), rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(own, kept) for own, kept in each.steps[-1])  # it did train behind the last update
    assert not any(p.requires_grad for name, p in module.named_parameters() if name in module.following_names)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_ln_2_behind_an_update(tmp_path, folder, kind):
    module, seen = following(folder, kind), Seen()
    data = preference_data(module, pairs(4), batch_size=4)
    trainer(tmp_path, max_steps=5, max_epochs=-1, callbacks=[seen]).fit(module, data)
    at_once = [math.isclose(loss, math.log(2), abs_tol=1e-6) for loss in seen.losses]
    assert at_once == [True, False, True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_goes_on_with_the_reference_that_it_had(tmp_path, folder, kind):
    def run(name, steps, checkpoint=None):
        module, save = following(folder, kind, 0.5), ModelCheckpoint(tmp_path / name, every_n_train_steps=3)
        data = preference_data(module, pairs(12), batch_size=2, packing=False)
        trainer(tmp_path, max_steps=steps, max_epochs=-1, callbacks=[save], enable_checkpointing=True).fit(
            module, data, ckpt_path=checkpoint
        )
        return module, save.best_model_path

    whole, _ = run("whole", 6)
    _, checkpoint = run("first", 3)
    again, _ = run("again", 6, checkpoint)
    for (own, kept), (other, also) in zip(of_both(again), of_both(whole), strict=True):
        assert torch.equal(own, other) and torch.equal(kept, also)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_predicts_and_exports_the_policy_alone(tmp_path, folder, kind):
    module, save = following(folder, kind), ModelCheckpoint(tmp_path, every_n_train_steps=3)
    data = preference_data(module, pairs(4), pairs(3, 1))
    trainer(tmp_path, max_steps=3, max_epochs=-1, callbacks=[save], enable_checkpointing=True).fit(module, data)
    batch = next(iter(data.val_dataloader()))
    saved = read_saved(Path(save.best_model_path))
    assert saved.trained and not any("reference" in name for name in [*saved.trained, *saved.networks])
    network, _ = restore(saved)
    expected = quiet_logps(module.network, batch)
    torch.testing.assert_close(quiet_logps(network, batch), expected, rtol=1e-5, atol=1e-5)
    again = following(folder, kind, generation={"greedy": DecodingConfig(max_new_tokens=2)})
    run = trainer(tmp_path)
    answers = run.predict(again, preference_data(again, val=pairs(3, 1)), ckpt_path=save.best_model_path)
    assert len(answers) > 0 and again.reference_model is None
    torch.testing.assert_close(quiet_logps(again.network, batch), expected, rtol=1e-5, atol=1e-5)
    validated = following(folder, kind)
    known = trainer(tmp_path).validate(validated, data, ckpt_path=save.best_model_path, verbose=False)[0]
    assert known["val/loss"] == pytest.approx(float(validation_loss(module, data)), abs=1e-6)


def validation_loss(module, data):
    """Of the live policy beside the live reference."""
    losses = []
    for batch in data.val_dataloader():
        ratios = quiet_logps(module.network, batch) - module.judged_logps(batch)
        sums = torch.stack([part.sum() for part in torch.split(ratios, batch.lengths)])
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (sums[batch.chosen] - sums[batch.rejected])))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    "peft",
    [
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"], total_step=3, tinit=0, tfinal=1, deltaT=1),
    ],
    ids=["pissa", "dora", "token rows", "adalora"],
)
def test_adapters_of_many_kinds_follow(tmp_path, folder, peft):
    seen = Seen()
    module = preference_module(str(folder / "base"), peft=peft, reference_sync=ReferenceSyncConfig(2), optimizer=FAST)
    data = preference_data(module, pairs(4), batch_size=4)
    trainer(tmp_path, max_steps=3, max_epochs=-1, callbacks=[seen]).fit(module, data)
    if isinstance(peft, AdaLoraConfig):  # its penalty is a part of the loss
        assert seen.losses[0] != pytest.approx(math.log(2), abs=1e-6)
    else:
        assert [math.isclose(loss, math.log(2), abs_tol=1e-6) for loss in seen.losses] == [True, False, True]
    assert any(not torch.equal(own, kept) for own, kept in of_both(module))


def test_second_adapter_leaves_the_first_and_the_base_as_they_are(folder):
    module = preference_module(str(folder / "base"), lora=True)
    before = {name: value.clone() for name, value in module.load_model().state_dict().items()}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    add_reference(module.network)
    after = module.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(own, kept) for own, kept in adapter_weights(module.network))


def test_halves_are_mixed_to_the_halfway_point():
    own, kept = torch.tensor([2.0, 4.0]), torch.tensor([0.0, 8.0])
    mix_into([(own, kept)], 0.5)
    assert kept.tolist() == [1.0, 6.0]
    assert own.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "cached"}, "reference is cached, which stays as it is"),
        ({"lora": True, "reference": "adapter_off"}, "reference is adapter_off, which stays as it is"),
        ({"losses": [LossConfig("simpo")]}, "reference_sync: simpo is compared with no reference"),
        ({"frozen": True}, "the adapter does not train"),
        ({"peft": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")}, "cannot stand twice on one base"),
        (
            {"peft": LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only")},
            "LoraConfig cannot stand twice on one base",
        ),
    ],
)
def test_reference_that_cannot_follow_is_refused(tmp_path, folder, settings, message):
    settings = dict(settings)
    if settings.pop("frozen", False):
        settings["adapter"] = AdapterConfig(str(folder / "adapter"))
    with pytest.raises(ConfigError, match=message):
        module = preference_module(
            str(folder / "base"), settings.pop("lora", False), reference_sync=ReferenceSyncConfig(2), **settings
        )
        data = preference_data(module, pairs(4), packing=False, batch_size=2)
        trainer(tmp_path, max_steps=1).fit(module, data)


@pytest.mark.parametrize(("every", "mix"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, 1.5), (1, -0.5)])
def test_sync_settings_without_a_meaning_are_refused(every, mix):
    with pytest.raises(ConfigError, match=r"model\.reference_sync\.(every_n_steps|mix) is"):
        ReferenceSyncConfig(every, mix)


@pytest.mark.parametrize("then", [True, False])
def test_resume_with_another_kind_of_reference_is_refused(tmp_path, folder, then):
    def module(follows):
        return following(folder, "full") if follows else preference_module(str(folder / "base"), optimizer=FAST)

    first, save = module(then), ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer(tmp_path, max_steps=1, callbacks=[save], enable_checkpointing=True).fit(
        first, preference_data(first, pairs(4))
    )
    second = module(not then)
    with pytest.raises(CheckpointError, match=r"model\.reference_sync is .*Set it as then"):
        trainer(tmp_path, max_steps=2).fit(second, preference_data(second, pairs(4)), ckpt_path=save.best_model_path)


def two_ranks(folder, out, kinds):
    """Each kind under DDP and under FSDP2, there with a resume in the middle; each writes policy and reference."""
    for kind in kinds:
        for strategy in ("ddp", "fsdp2"):
            for name, steps, checkpoint in (("first", 3, None), ("again", 5, "first")):
                module = following(folder, kind, 0.5)
                save = ModelCheckpoint(out / f"{kind}-{strategy}-{name}", "saved", every_n_train_steps=3)
                run = trainer(
                    out,
                    devices=2,
                    strategy=DDPStrategy(process_group_backend="gloo")
                    if strategy == "ddp"
                    else FSDP2Strategy(process_group_backend="gloo"),
                    max_steps=steps,
                    max_epochs=-1,
                    callbacks=[save],
                    enable_checkpointing=True,
                )
                data = preference_data(module, pairs(12), batch_size=2, packing=False)
                path = None if checkpoint is None else str(out / f"{kind}-{strategy}-{checkpoint}" / "saved.ckpt")
                run.fit(module, data, ckpt_path=path)
            torch.save(of_both(module), out / f"{kind}-{strategy}-{run.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_follow_as_one_process_and_resume(tmp_path, folder):
    run_on_ranks(two_ranks, folder, tmp_path, KINDS)
    for kind in KINDS:
        module = following(folder, kind, 0.5)
        data = preference_data(module, pairs(12), batch_size=4, packing=False)
        trainer(tmp_path, max_steps=5, max_epochs=-1).fit(module, data)
        for strategy in ("ddp", "fsdp2"):
            for rank in (0, 1):
                found = torch.load(tmp_path / f"{kind}-{strategy}-{rank}.pt")
                for (own, kept), (other, also) in zip(found, of_both(module), strict=True):
                    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(kept, also, rtol=1e-3, atol=1e-4)


def refused(folder, out):
    module = following(folder, "full")
    with pytest.raises(ConfigError, match="checkpoints of DeepSpeed leave the reference out"):
        trainer(out, strategy=DeepSpeedOnCPU(2), devices=2, max_steps=1).fit(module, preference_data(module, pairs(4)))


@pytest.mark.slow
def test_deepspeed_is_refused(tmp_path, folder):
    run_on_ranks(refused, folder, tmp_path)


def test_attribute_of_the_copy_is_what_checkpoints_are_read_by(tmp_path, folder):
    module = following(folder, "full")
    trainer(tmp_path, max_steps=1).fit(module, preference_data(module, pairs(4)))
    assert module.reference_model is getattr(module, COPY)
    assert module.following_names == {name for name, _ in module.named_parameters(remove_duplicate=False)} - {
        name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
