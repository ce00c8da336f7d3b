"""Gradients and losses of SFT against a slow loop over single conversations."""

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from lit_alignment.data.batching.collate import collate_packed
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.modules.sft import neftune_noise
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, encoder, record, sft_data, sft_module, trainer

ONE_BATCH = {"tokens_per_batch": 100_000}


class Recorder(Callback):
    """Gradients, losses and record ids of each optimizer step."""

    def __init__(self):
        self.gradients, self.losses, self.ids = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(batch.ids)
        if len(self.gradients) > len(self.losses):  # this batch ended an optimizer step
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def run(folder, records, accumulate=1, lora=False, module=None, trainer_options=None, **data):
    module = module or sft_module(lora=lora)
    recorder = Recorder()
    options = {"accumulate_grad_batches": accumulate, "callbacks": [recorder], **(trainer_options or {})}
    trainer(folder, **options).fit(module, sft_data(module, records, **data))
    return recorder


def assert_equal_gradients(one, other):
    assert one.keys() == other.keys() and one
    for name, gradient in one.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5 * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_accumulation_equals_one_big_batch(tmp_path, packing, lora):
    """Batches of very unequal numbers of trained tokens; stock accumulation would weigh each batch equally."""
    records = chats(12)
    whole = run(tmp_path, records, lora=lora, **ONE_BATCH)
    parts = run(tmp_path, records, accumulate=20, lora=lora, packing=packing, batch_size=2)
    assert len(whole.gradients) == len(parts.gradients) == 1 and len(parts.ids) > 1
    assert_equal_gradients(whole.gradients[0], parts.gradients[0])


def test_gradient_equals_a_slow_loop_over_single_conversations(tmp_path):
    records = chats(6)
    module = sft_module()
    found = run(tmp_path, records, module=module, trainer_options={"max_steps": 1}, **ONE_BATCH)
    fresh = sft_module()
    fresh.load_model().load_state_dict(_start_weights(tmp_path))
    data = sft_data(fresh, records, **ONE_BATCH)
    data.setup("fit")
    total, count = torch.zeros(()), 0
    for row in data.examples["train"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = fresh.model(input_ids=ids, use_cache=False).logits[0]
        for position in range(1, len(labels)):
            if labels[position] != IGNORE_INDEX:
                total = total - logits[position - 1].log_softmax(-1)[labels[position]]
                count += 1
    (total / count).backward()
    expected = {f"model.{n}": p.grad for n, p in fresh.model.named_parameters()}
    assert_equal_gradients(expected, found.gradients[0])
    assert found.losses[-1] == pytest.approx(float(total.detach()) / count, rel=1e-5)


def _start_weights(folder):
    """The weights that `run` starts from: seeded in `sft_module`, drawn when the trainer loads the model."""
    module = sft_module()
    keep = {}

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            keep.update({k: v.clone() for k, v in pl_module.model.state_dict().items()})

    trainer(folder, callbacks=[Keep()], max_steps=1).fit(module, sft_data(module, chats(2)))
    return keep


def test_last_shorter_window_is_scaled_by_its_own_tokens(tmp_path):
    """Five batches in windows of four: with the weights held still, the second step's gradient is its batch's own."""
    records = chats(10)
    still = {"optimizer": OptimizerConfig(learning_rate=1e-30, schedule="constant", warmup=0)}
    windows = run(tmp_path, records, 4, module=sft_module(**still), packing=False, batch_size=2)
    single = run(tmp_path, records, 1, module=sft_module(**still), packing=False, batch_size=2)
    assert len(windows.gradients) == 2 and len(single.gradients) == 5 and windows.ids == single.ids
    assert_equal_gradients(single.gradients[4], windows.gradients[1])
    assert windows.losses[-1] == pytest.approx(single.losses[-1], rel=1e-5)


def test_limited_batches_are_scaled_by_what_was_seen(tmp_path):
    still = {"optimizer": OptimizerConfig(learning_rate=1e-30, schedule="constant", warmup=0)}
    limited = run(
        tmp_path, chats(10), 4, module=sft_module(**still), trainer_options={"limit_train_batches": 1}, packing=False
    )
    single = run(
        tmp_path, chats(10), 1, module=sft_module(**still), trainer_options={"limit_train_batches": 1}, packing=False
    )
    assert_equal_gradients(single.gradients[0], limited.gradients[0])


def test_validation_loss_is_a_mean_over_tokens_under_any_batching(tmp_path):
    records = chats(15, seed=1)
    losses = []
    for settings in (ONE_BATCH, {"tokens_per_batch": 512}, {"packing": False, "batch_size": 1}, {"packing": False}):
        module = sft_module()
        found = trainer(tmp_path).validate(module, sft_data(module, records, records, **settings), verbose=False)
        losses.append(found[0]["val/loss"])
        assert found[0]["val/perplexity"] == pytest.approx(torch.tensor(losses[-1]).exp().item(), rel=1e-6)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_test_stage_reports_the_same_numbers_as_validation(tmp_path):
    module = sft_module()
    data = sft_data(module, chats(4), chats(8, seed=1))
    runner = trainer(tmp_path)
    validation = runner.validate(module, data, verbose=False)[0]
    found = runner.test(module, data, verbose=False)[0]
    assert found["test/loss"] == validation["val/loss"]
    assert found["test/token_accuracy"] == validation["val/token_accuracy"]


def test_message_weight_scales_its_share_of_the_loss(tmp_path):
    """A conversation of weight 3 beside one of weight 1 trains as three copies beside one."""
    first, second = chats(2)
    heavy = {**first, "messages": [{**m, "weight": 3.0} for m in first["messages"]]}
    copies = [{**first, "id": str(i)} for i in range(3)]
    weighted = run(tmp_path, [heavy, second], **ONE_BATCH)
    repeated = run(tmp_path, [*copies, second], **ONE_BATCH)
    assert_equal_gradients(repeated.gradients[0], weighted.gradients[0])


@pytest.mark.slow
def test_tiny_model_overfits_eight_conversations(tmp_path):
    records = chats(8, longest=8)
    options = {"max_epochs": 60}
    found = run(tmp_path, records, module=sft_module(), trainer_options=options, tokens_per_batch=512)
    assert found.losses[-1] < 0.05 < found.losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.1},
        {"neftune_alpha": 5.0},
        {"backbone": BackboneConfig("configs/tiny", weights="random", gradient_checkpointing=True)},
    ],
    ids=["smoothing", "neftune", "gradient-checkpointing"],
)
def test_training_options_learn_too(tmp_path, settings):
    module = sft_module(**{k: v for k, v in settings.items() if k != "backbone"})
    module.backbone = settings.get("backbone", module.backbone)
    found = run(tmp_path, chats(8), module=module, trainer_options={"max_epochs": 15}, tokens_per_batch=512)
    assert found.losses[-1] < 0.7 * found.losses[0]


def test_gradient_checkpointing_does_not_change_gradients(tmp_path):
    plain = run(tmp_path, chats(4), **ONE_BATCH)
    module = sft_module()
    module.backbone = BackboneConfig("configs/tiny", weights="random", gradient_checkpointing=True)
    saved = run(tmp_path, chats(4), module=module, **ONE_BATCH)
    assert module.network.training
    assert_equal_gradients(plain.gradients[0], saved.gradients[0])


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_compiled_layers_train_as_plain_ones_on_rows_of_one_length(tmp_path, monkeypatch):
    plain = run(tmp_path, chats(12), tokens_per_batch=512)
    module = sft_module()
    module.backbone = BackboneConfig("configs/tiny", weights="random", compile=True)
    shapes = []
    step = module.step
    monkeypatch.setattr(module, "step", lambda batch, stage: shapes.append(batch.input_ids.shape) or step(batch, stage))
    compiled = run(tmp_path, chats(12), module=module, tokens_per_batch=512)
    assert set(shapes) == {(1, 512)} and len(shapes) > 2
    assert counters["frames"]["total"] == counters["frames"]["ok"] < 10  # what one layer splits into, once
    for expected, found in zip(plain.gradients, compiled.gradients, strict=True):
        assert_equal_gradients(expected, found)


def test_label_smoothing_stays_out_of_validation(tmp_path):
    losses = []
    for smoothing in (0.0, 0.3):
        module = sft_module(label_smoothing=smoothing)
        data = sft_data(module, chats(4), chats(4))
        losses.append(trainer(tmp_path).validate(module, data, verbose=False)[0]["val/loss"])
    assert losses[0] == losses[1]


def test_neftune_noise_is_bounded_by_each_document_s_own_length(tokenizer):
    torch.manual_seed(0)
    examples = [encoder(tokenizer).encode(record("Hi", "now")), encoder(tokenizer).encode(record("a b c d e f", "g"))]
    lengths = [len(example.input_ids) for example in examples]
    bounds = torch.cat([torch.full((n,), 5 / (n * 64) ** 0.5) for n in lengths])
    noise = neftune_noise(torch.zeros(1, sum(lengths), 64), collate_packed(examples), 5.0)[0]
    assert bool((noise.abs() <= bounds[:, None]).all())
    assert bool((noise.abs().amax(1) > 0.8 * bounds).all())


def test_logged_gradient_norm_is_the_true_one(tmp_path):
    module = sft_module()
    recorder = Recorder()
    runner = trainer(tmp_path, callbacks=[recorder], gradient_clip_val=1e-4, max_steps=1)
    runner.fit(module, sft_data(module, chats(4), **ONE_BATCH))
    expected = torch.stack([g.norm() for g in recorder.gradients[0].values()]).norm()
    assert float(runner.callback_metrics["train/grad_norm"]) == pytest.approx(float(expected), rel=1e-5)


def test_examples_longer_than_a_row_are_refused_before_training():
    module = sft_module()
    with pytest.raises(ValueError, match="data.tokens_per_batch is 64, less than encoding.max_length 128"):
        sft_data(module, chats(2), encoding=EncodingConfig(max_length=128), tokens_per_batch=64)
