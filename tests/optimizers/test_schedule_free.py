"""AdamW without a schedule: the three sequences of the paper, and what a run evaluates, saves and resumes."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.errors import ConfigError
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW
from tests.helpers import Seen, chats, sft_data, sft_module, trainer, weights

USUAL = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=3, algorithm=ScheduleFreeAdamW)
RATES = (0.05, 0.1, 0.1, 0.1)  # with warm-up


def test_weights_and_averages_are_those_of_the_paper():
    """z, x and y kept apart, in float64: x <- (1 - c) x + c z, y = (1 - beta1) z + beta1 x."""
    torch.manual_seed(0)
    beta1, beta2, eps, decay = 0.9, 0.75, 0.01, 0.2
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([weight], lr=0.1, weight_decay=decay, betas=(beta1, beta2), eps=eps)
    x = z = y = weight.detach().clone()
    square, total = torch.zeros_like(z), 0.0
    for step, rate in enumerate(RATES, 1):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.randn_like(weight)
        square = beta2 * square + (1 - beta2) * weight.grad**2
        z = z - rate * (weight.grad / ((square / (1 - beta2**step)).sqrt() + eps) + decay * y)
        total += rate**2
        share = rate**2 / total
        x = (1 - share) * x + share * z
        y = (1 - beta1) * z + beta1 * x
        optimizer.step()
        torch.testing.assert_close(weight.detach(), y)
        torch.testing.assert_close(optimizer.averages()[weight], x)


def test_weights_and_averages_are_those_of_the_reference_implementation():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(4, 3))
    theirs = nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-3}
    first = ScheduleFreeAdamW([ours], **settings)
    second = schedulefree.AdamWScheduleFree([theirs], **settings)
    second.train()
    for rate in RATES:
        first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = rate
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
        torch.testing.assert_close(ours, theirs)
        second.eval()
        torch.testing.assert_close(first.averages()[ours], theirs.detach())
        second.train()


def fit(folder, resume=None, callbacks=(), **options):
    module = sft_module(optimizer=USUAL)
    data = sft_data(module, chats(12), chats(4, seed=1), packing=False, batch_size=2)
    usual = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": True, "val_check_interval": 4}
    runner = trainer(folder, callbacks=[*callbacks], **(usual | options))
    runner.fit(module, data, ckpt_path=resume)
    return module


class Evaluated(Seen):
    """The weights that train behind each step and around validations, and those that are validated."""

    def __init__(self):
        super().__init__()
        self.live, self.around, self.validated, self.expected = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.live.append(weights(pl_module))

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.around.append((self.live[-1], len(self.live)))
            self.validated.append(weights(pl_module))
            known = {id(p): n for n, p in pl_module.named_parameters()}
            state = trainer.optimizers[0].state
            z = {known[id(p)]: own["z"].clone() for p, own in state.items()}
            self.expected.append({n: y.lerp(z[n], 1 - 1 / 0.9) for n, y in self.live[-1].items()})

    def on_train_batch_start(self, trainer, pl_module, *rest):
        if self.around and self.around[-1][1] == len(self.live):
            live, found = self.around[-1][0], weights(pl_module)
            assert all(torch.equal(found[name], value) for name, value in live.items())


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_run_evaluates_saves_and_exports_the_averages_and_resumes_to_the_bit(tmp_path):
    """From a checkpoint of validation, when the averages stand in the model, and from one between validations."""
    seen = Evaluated()
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    ranked = ModelCheckpoint(tmp_path / "ranked", monitor="val/loss", save_top_k=-1, filename="{step}")
    module = fit(tmp_path, callbacks=[seen, saver, ranked])
    assert len(seen.validated) == 2
    for validated, expected, (live, _) in zip(seen.validated, seen.expected, seen.around, strict=True):
        assert_equal(validated, expected)
        assert any(not torch.equal(validated[name], live[name]) for name in live)
    path = next((tmp_path / "ranked").iterdir())
    stored = torch.load(path, weights_only=True)
    assert_equal({n: stored["state_dict"][n] for n in seen.validated[0]}, seen.validated[0])
    network, _ = restore(read_saved(path))
    exported = dict(network.named_parameters())
    assert_equal({f"model.{n}": p.detach() for n, p in exported.items()}, seen.validated[0])
    for each in (path, tmp_path / "saved/step=3.ckpt"):
        assert_equal(weights(fit(tmp_path / "again", resume=each)), weights(module))


def test_two_averages_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="ScheduleFreeAdamW averages the weights, and so does a callback"):
        fit(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])


def test_settings_that_cannot_be_are_refused():
    for settings in ({"betas": (0.0, 0.9)}, {"betas": (0.9, 1.0)}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ScheduleFreeAdamW([nn.Parameter(torch.zeros(2))], **settings)
