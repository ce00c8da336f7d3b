"""Averaged weights, and ranks that fall: what the training loop has to do for them, resumed too."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import AdaLoraConfig, LoraConfig

from lit_alignment import Export, SFTModule
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import Seen, base_model_folder, chats, sft_data, trainer, weights
from tests.modules.test_trainer_settings import Losses

USUAL = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADALORA = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 1, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_model_folder(tmp_path_factory.mktemp("base"))


def fit(folder, base, callbacks, peft=LORA, resume=None, **options):
    torch.manual_seed(0)
    module = SFTModule(BackboneConfig(base), peft, optimizer=USUAL)
    usual = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    runner = trainer(folder, callbacks=callbacks, **(usual | options))
    runner.fit(module, sft_data(module, chats(14), chats(4, seed=1), packing=False, batch_size=2), ckpt_path=resume)
    return module


def assert_same_weights(found, expected, step=None):
    values = weights(found)
    for name, value in weights(expected).items():
        assert torch.equal(value, values[name]), (step, name)


class Steps(Seen):
    """The trained weights behind each step, and those that validation saw."""

    def __init__(self):
        super().__init__()
        self.live, self.validated = [], None

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step > len(self.live):
            self.live.append(weights(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *rest):
        self.validated = weights(pl_module)


def saver(folder):
    return ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")


@pytest.mark.slow
def test_average_is_that_of_the_trained_weights_alone_and_resumes(tmp_path, base):
    steps = Steps()
    frozen = SFTModule(BackboneConfig(base), LORA).load_model().state_dict()
    module = fit(tmp_path, base, [EMAWeightAveraging(decay=0.5), steps, saver(tmp_path)])
    expected, at_five = None, None
    for number, live in enumerate(steps.live):
        expected = live if expected is None else {k: 0.5 * v + 0.5 * live[k] for k, v in expected.items()}
        at_five = expected if number == 4 else at_five
    for name, value in weights(module).items():  # at the end the averages are the model
        torch.testing.assert_close(value, expected[name])
        torch.testing.assert_close(steps.validated[name], expected[name])
    trained = set(weights(module))
    for name, value in module.model.state_dict().items():
        assert f"model.{name}" in trained or torch.equal(value, frozen[name]), name
    stored = torch.load(tmp_path / "saved/step=5.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(stored["current_model_state"]) == trained
    for name, value in at_five.items():
        torch.testing.assert_close(stored["state_dict"][name], value)
        assert torch.equal(stored["current_model_state"][name], steps.live[4][name])
    again = fit(tmp_path, base, [EMAWeightAveraging(decay=0.5)], resume=tmp_path / "saved/step=5.ckpt")
    assert_same_weights(again, module)


class SaveAt(Callback):
    """Saves at each call of a hook."""

    def __init__(self, folder, hook):
        self.folder, self.steps = folder, []
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if not trainer.sanity_checking and trainer.global_step not in self.steps:
            self.steps.append(trainer.global_step)
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_validation_epoch_start", "on_validation_epoch_end", "on_train_end"]
)
def test_average_resumes_from_a_save_at_any_hook_before_its_own(tmp_path, base, hook):
    options = {"val_check_interval": 3, "max_epochs": 3}
    module = fit(tmp_path, base, [SaveAt(tmp_path, hook), EMAWeightAveraging(decay=0.5)], **options)
    saver = SaveAt(tmp_path, hook)
    fit(tmp_path, base, [saver, EMAWeightAveraging(decay=0.5)], **(options | {"max_epochs": 2}))
    assert saver.steps
    for step in saver.steps:
        path = tmp_path / f"{step}.ckpt"
        again = fit(tmp_path, base, [EMAWeightAveraging(decay=0.5)], resume=path, **options)
        assert_same_weights(again, module, step)


@pytest.mark.slow
def test_run_goes_on_without_its_average_from_the_live_weights(tmp_path, base):
    fit(tmp_path, base, [EMAWeightAveraging(decay=0.5), saver(tmp_path)])
    plain = fit(tmp_path, base, [])
    again = fit(tmp_path, base, [], resume=tmp_path / "saved/step=5.ckpt")
    assert_same_weights(again, plain)


@pytest.mark.slow
def test_ranks_fall_to_the_target_and_resume(tmp_path, base):
    peft = AdaLoraConfig(**ADALORA, total_step=8, task_type="CAUSAL_LM")
    steps = Steps()
    module = fit(tmp_path, base, [steps, saver(tmp_path), Export(form="merged")], peft)
    ranks = [sum(int(v.count_nonzero()) for k, v in live.items() if "lora_E" in k) for live in steps.live]
    layers = sum("lora_E" in name for name in steps.live[0])
    assert len(ranks) == 8 and ranks[2] == 6 * layers and ranks[-1] == 2 * layers
    assert ranks[2:6] == sorted(ranks[2:6], reverse=True) and ranks[2] > ranks[3]
    for step in (3, 5, 7):
        again = fit(tmp_path, base, [], peft, resume=tmp_path / f"saved/step={step}.ckpt")
        assert_same_weights(again, module, step)


def test_schedule_of_ranks_that_does_not_end_with_the_run_is_refused(tmp_path, base):
    peft = AdaLoraConfig(**ADALORA, total_step=10, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"total_step is 10, and the run has 8 optimizer steps. Set it to 8"):
        fit(tmp_path, base, [], peft)


@pytest.mark.slow
def test_orthogonality_is_a_part_of_the_loss_of_each_step(tmp_path, base):
    """Its weight changes what is learned, and by as much whatever the windows are."""
    found = {}
    for weight in (0.0, 0.5):
        for windows in (1, 2):
            settings = ADALORA | {"tinit": 1, "tfinal": 1}
            peft = AdaLoraConfig(**settings, total_step=4, orth_reg_weight=weight, task_type="CAUSAL_LM")
            data = {"accumulate_grad_batches": windows, "max_steps": 4, "max_epochs": -1, "limit_val_batches": 0}
            module = fit(tmp_path, base, [], peft, **data)
            rows = [v for k, v in weights(module).items() if "lora_A" in k]
            found[weight, windows] = sum(float((r @ r.T - torch.eye(len(r))).norm()) for r in rows)
    assert found[0.5, 1] < 0.9 * found[0.0, 1] and found[0.5, 2] < 0.9 * found[0.0, 2]
    assert found[0.5, 1] == pytest.approx(found[0.5, 2], rel=0.2)


def test_penalty_of_a_shorter_last_window_counts_whole(tmp_path, base):
    """One micro-batch of two: the gradient is that of windows of one."""
    norms = []
    for windows in (1, 2):
        settings = ADALORA | {"tinit": 0, "tfinal": 1, "orth_reg_weight": 50.0}
        peft = AdaLoraConfig(**settings, total_step=2 + 1, task_type="CAUSAL_LM")
        log = Losses()
        data = {"accumulate_grad_batches": windows, "max_epochs": 3, "limit_train_batches": 1, "limit_val_batches": 0}
        fit(tmp_path, base, [], peft, logger=log, log_every_n_steps=1, **data)
        norms.append([log.found[step]["train/grad_norm"] for step in range(3)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
