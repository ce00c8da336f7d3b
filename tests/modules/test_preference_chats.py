"""Plain chats beside pairs: a loss and a token mean of their own, under any layout and split into micro-batches."""

import math
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import logsigmoid

from lit_alignment import LossConfig, PreferenceDataModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.losses.pairs import pair_loss, pairs_of, response_loss, responses_of
from lit_alignment.losses.preference_config import FORMS
from lit_alignment.models.reference import adapters_off
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.tools.inspect import main
from tests.helpers import (
    Seen,
    base_model_folder,
    chats,
    judged,
    pairs,
    preference_data,
    preference_module,
    sft_data,
    sft_module,
    trainer,
    write_jsonl,
)

BETA, CHAT_WEIGHT = 0.5, 0.7
STILL = OptimizerConfig(learning_rate=1e-30, schedule="constant", warmup=0)
LAYOUTS = {
    "shared": {"tokens_per_batch": 512},
    "packed": {"tokens_per_batch": 512, "share_prompts": False},
    "padded": {"packing": False, "batch_size": 2},
    "single": {"packing": False, "batch_size": 1},
}


def talks(number, seed=3):
    """Chats, of which one has a message of half the weight, and one a message that is not trained."""
    records = chats(number, seed)
    records[0]["messages"][1]["weight"] = 0.5
    records[1]["messages"][1]["train"] = len(records[1]["messages"]) == 2
    return records


def source(records, name="chats", **settings):
    return SourceConfig(records=records, name=name, **settings)


def moved(path, **settings):
    """A module whose policy is not its reference, so that losses and gradients of all kinds are there."""
    settings = {"losses": [LossConfig("sigmoid", beta=BETA)], "chat_weight": CHAT_WEIGHT, "optimizer": STILL} | settings
    module = preference_module(path, lora=True, **settings)
    load = module.load_model

    def changed(*arguments, **options):
        network = load(*arguments, **options)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
        return network

    module.load_model = changed
    return module


class Steps(Callback):
    """Record ids, loss and gradients of each optimizer step."""

    def __init__(self):
        self.ids, self.gradients, self.losses = [[]], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids[-1] += [] if batch.dummy else batch.ids
        if len(self.gradients) > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.ids.append([])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def token_logps(network, ids):
    return network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def response_ids(tokenizer, prompt, response):
    """Ids of a prompt and its response, and where this begins."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return torch.tensor(ids[: len(ids) - ids[::-1].index(end)]), len(asked)


def slow_parts(path, records, talks):
    """Of each record its loss, summed over a chat's tokens, what it counts, and its gradient, by a pass of its own."""
    module = moved(path)
    network = module.load_model().eval().double()
    encoded = sft_data(sft_module(), talks)
    encoded.setup("fit")

    def of_pair(record):
        gap = 0.0
        for sign, side in ((1, "chosen"), (-1, "rejected")):
            ids, start = response_ids(module.tokenizer, record["prompt"], record[side])
            with torch.no_grad(), adapters_off(network):
                reference = token_logps(network, ids)[start - 1 :].sum()
            gap = gap + sign * (token_logps(network, ids)[start - 1 :].sum() - reference)
        return -logsigmoid(BETA * gap), 1.0

    def of_chat(row):
        weights = torch.tensor(row["weights"])[1:]
        return -(weights * token_logps(network, torch.tensor(row["input_ids"]))).sum(), float(weights.sum())

    losses = {f"train/{record['id']}": of_pair(record) for record in records}
    losses |= {f"chats/{row['id']}": of_chat(row) for row in encoded.examples["train"]}
    found = {}
    for name, (loss, number) in losses.items():
        module.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found[name] = (loss.detach(), number, gradients)
    return found


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A base, records, and what each of them alone gives."""
    path = base_model_folder(tmp_path_factory.mktemp("chats") / "base")
    records, talk = pairs(5), talks(6)
    return path, records, talk, slow_parts(path, records, talk)


def expected_step(parts, ids):
    """Loss and gradients of a step on some records: a mean over pairs, and one over tokens of chats."""
    loss, gradients = 0.0, Counter()
    for kind, weight in (("train", 1.0), ("chats", CHAT_WEIGHT)):
        own = [parts[name] for name in ids if name.startswith(kind)]
        for value, _, gradient in own:
            share = weight / sum(number for _, number, _ in own)
            loss += share * float(value)
            for name, each in gradient.items():
                gradients[name] = gradients[name] + share * each
    return loss, gradients


@pytest.mark.parametrize("accumulate", [1, 3, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_pairs_and_chats_equal_a_slow_loop_over_single_records(tmp_path, slow, layout, accumulate):
    """Of any pairs and chats, of pairs alone and of chats alone, and of the last shorter window."""
    path, records, talk, parts = slow
    module, steps = moved(path), Steps()
    data = preference_data(module, records, chats=[source(talk)], **LAYOUTS[layout])
    options = {"accumulate_grad_batches": accumulate, "precision": "64-true", "log_every_n_steps": 1}
    trainer(tmp_path, callbacks=[steps], **options).fit(module, data)
    seen = sorted(name for ids in steps.ids for name in ids)
    assert seen == sorted(parts) and len(steps.losses) == (1 if accumulate == 20 else len(steps.ids) - 1)
    kinds = {frozenset(name.partition("/")[0] for name in ids) for ids in steps.ids[:-1]}
    if layout == "single":
        assert kinds >= {1: {frozenset(["train"]), frozenset(["chats"])}, 3: set(), 20: set()}[accumulate]
    for ids, loss, gradients in zip(steps.ids, steps.losses, steps.gradients, strict=False):
        expected, slow_gradients = expected_step(parts, ids)
        assert loss == pytest.approx(expected, rel=1e-7)
        for name, gradient in slow_gradients.items():
            difference = (gradients[name] - gradient).abs().max()
            assert float(difference) <= 1e-6 * float(gradient.abs().max()), name


def test_cached_reference_is_of_responses_alone(tmp_path, slow):
    """Chats, even of the pairs' name and ids, change nothing in the cache, and train as beside a copy."""
    path, records, talk, _ = slow
    found, files = [], []
    for reference, given in (("cached", None), ("cached", talk), ("frozen_copy", talk)):
        module, seen = preference_module(path, reference=reference), Seen()
        shape = LAYOUTS["padded"] | {"cache_dir": str(tmp_path / "cache")}
        data = preference_data(module, records, chats=[source(given, name="train")] if given else None, **shape)
        trainer(tmp_path, callbacks=[seen], max_epochs=2, accumulate_grad_batches=3).fit(module, data)
        found.append(seen.losses)
        files.append({file.name for file in (tmp_path / "cache").glob("reference-*")})
    assert files[0] == files[1] and len(files[0]) == 1
    assert found[1] == pytest.approx(found[2], rel=1e-4) and len(found[1]) > len(found[0])


@pytest.mark.parametrize("name", ["kto", "kto_pair"])
def test_estimate_of_a_step_is_that_without_its_chats(tmp_path, name):
    path, kind = base_model_folder(tmp_path / "base"), "outcomes" if name == "kto" else "preferences"
    records, found = (judged if name == "kto" else pairs)(7), []
    for given, layout in ((None, "padded"), ([source(talks(9))], "padded"), ([source(talks(9))], "single")):
        settings = {"chat_weight": CHAT_WEIGHT} if given else {"chat_weight": 1.0}
        module = moved(path, losses=[LossConfig(name)], **settings)
        data = preference_data(module, records, chats=given, kind=kind, **LAYOUTS[layout])
        run = trainer(tmp_path, max_steps=1, accumulate_grad_batches=16, log_every_n_steps=1, precision="64-true")
        run.fit(module, data)
        values = {key: float(value) for key, value in run.callback_metrics.items()}
        found.append((module._baselines["train"].tolist(), values))
    (z, alone), *others = found
    assert max(z) > 1e-4
    for own, values in others:
        assert own == pytest.approx(z, rel=1e-6)
        assert values.pop("train/chat_loss") > 0
        for key in alone.keys() - {"train/loss", "train/grad_norm"}:
            assert values[key] == pytest.approx(alone[key], rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("name", FORMS)
def test_every_loss_of_a_micro_batch_of_chats_alone_is_zero(name):
    config, logps, numbers = LossConfig(name), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    if config.form.of == "responses":
        loss = response_loss(config, responses_of(logps, logps, [], numbers), logps > 0, 0.3)
    else:
        loss = pair_loss(config, pairs_of(logps, logps, [], numbers, numbers, numbers, logps, torch.ones(2)))
    assert loss.shape == (0,) and loss.sum() == 0


def test_balance_and_margins_are_of_judged_records(tmp_path, caplog):
    module = preference_module(losses=[LossConfig("kto")])
    data = preference_data(module, judged(12), chats=[source(talks(6))], kind="outcomes")
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert "8 good responses with weight 1, 4 bad ones with weight 1" in caplog.text
    module = preference_module(losses=[LossConfig("sigmoid_margin")])  # which chats do not have
    trainer(tmp_path, max_steps=1).fit(module, preference_data(module, pairs(4), chats=[source(talks(6))]))
    module = preference_module()
    trainer(tmp_path, max_steps=1).fit(module, preference_data(module, pairs(4), chats=[source(talks(6))]))
    assert "4 of 4 records have a margin, which sigmoid does not read" in caplog.text


def test_logged_loss_of_chats_is_a_mean_over_tokens_since_the_last_time(tmp_path, slow):
    path, records, talk, parts = slow
    module = moved(path)
    data = preference_data(module, records, records[:2], chats=[source(talk)], **LAYOUTS["padded"])
    run = trainer(tmp_path, max_epochs=1, log_every_n_steps=6)
    run.fit(module, data)
    own = [(float(loss), number) for name, (loss, number, _) in parts.items() if name.startswith("chats")]
    expected = sum(loss for loss, _ in own) / sum(number for _, number in own)
    assert run.global_step == 6
    assert float(run.callback_metrics["train/chat_loss"]) == pytest.approx(expected, rel=1e-5)
    assert "val/chat_loss" not in run.callback_metrics and "val/loss" in run.callback_metrics


def test_nothing_is_logged_of_chats_where_there_are_none(tmp_path):
    module = preference_module()
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    run.fit(module, preference_data(module, pairs(4)))
    assert "train/chat_loss" not in run.callback_metrics and "train/margin" in run.callback_metrics


def test_resumed_training_goes_on_with_the_same_losses(tmp_path):
    path = base_model_folder(tmp_path / "base")

    def run(callbacks=(), resume=None):
        module = preference_module(path, lora=True, chat_weight=CHAT_WEIGHT)
        data = preference_data(module, pairs(7), chats=[source(talks(7))], **LAYOUTS["padded"])
        seen = Seen()
        options = {"accumulate_grad_batches": 2, "max_epochs": 2, "enable_checkpointing": bool(callbacks)}
        trainer(tmp_path, callbacks=[seen, *callbacks], **options).fit(module, data, ckpt_path=resume)
        return seen

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = run([saver])
    rest = run(resume=tmp_path / "saved/step=2.ckpt")
    assert rest.losses == whole.losses[4:] and rest.ids == whole.ids[4:] and len(rest.losses) == 10


def test_weights_of_sources_are_shares_of_an_epoch_with_chats(tmp_path):
    module = preference_module()
    train = [source(pairs(6), "pairs", weight=0.8)]
    data = PreferenceDataModule(module.tokenizer, train=train, chats=[source(talks(9), weight=0.2)])
    data.setup("fit")
    assert Counter(data.examples["train"]["dataset"]) == {"pairs": 12, "chats": 3}


def test_chats_are_encoded_as_in_supervised_fine_tuning():
    module = preference_module()
    data = preference_data(module, pairs(2), chats=[source(talks(4))])
    sft = sft_data(sft_module(), talks(4))
    data.setup("fit")
    sft.setup("fit")
    rows = list(data.examples["train"])[2:]
    for row, expected in zip(rows, sft.examples["train"], strict=True):
        ((name, example),) = data.views(row)
        assert name == "chat" and example.input_ids == expected["input_ids"]
        assert example.labels == expected["labels"] and example.weights == expected["weights"]
        assert (row["length"], row["num_trained"], row["chat_tokens"], row["weight"]) == (
            expected["length"],
            expected["num_trained"],
            expected["weight"],
            0.0,
        )
    assert 0.5 in rows[0]["token_weights"]


def test_one_file_may_hold_judged_responses_and_chats(tmp_path):
    """Encoded one way and the other, each is cached apart."""
    record = {"id": "a", "messages": [{"role": "user", "content": "order"}, {"role": "assistant", "content": "yes"}]}
    path = write_jsonl(tmp_path / "both.jsonl", [record | {"label": 1}])
    module = preference_module(losses=[LossConfig("kto")])
    settings = {"kind": "outcomes", "cache_dir": str(tmp_path / "cache")}
    data = PreferenceDataModule(module.tokenizer, train=[SourceConfig(path)], chats=[SourceConfig(path)], **settings)
    data.setup("fit")
    assert [row["scores"] for row in data.examples["train"]] == [[1.0], []]


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"chat_weight": 0.5}, None, "chat_weight is 0.5, and there are no chats. Give data.chats"),
        ({"chat_weight": 0.0}, talks(2), "chat_weight is 0.0; use more than 0"),
        ({"chat_weight": math.inf}, talks(2), "chat_weight is inf; use more than 0"),
    ],
)
def test_weight_without_effect_or_sense_is_refused(tmp_path, settings, given, message):
    with pytest.raises(ConfigError, match=message):
        module = preference_module(**settings)
        data = preference_data(module, pairs(2), chats=[source(given)] if given else None)
        trainer(tmp_path, max_steps=1).fit(module, data)


def test_data_without_chats_can_be_validated_after_training_with_them(tmp_path):
    module = preference_module(chat_weight=0.5)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, preference_data(module, pairs(3), chats=[source(talks(3))]))
    (values,) = run.validate(module, preference_data(module, val=pairs(3)), verbose=False)
    assert math.isfinite(values["val/loss"])


def test_chats_of_another_form_are_refused_with_file_and_line(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [talks(2)[0], pairs(1)[0]])
    module = preference_module()
    with pytest.raises(RecordError, match=r"chats\.jsonl:2: field 'messages' is missing"):
        preference_data(module, pairs(2), chats=[SourceConfig(path)]).setup("fit")


def test_chats_alone_are_no_preferences():
    equal = {"id": "a", "prompt": "order", "chosen": "yes", "rejected": "yes"}  # dropped
    data = preference_data(preference_module(), [equal], chats=[source(talks(2))])
    with pytest.raises(ConfigError, match="only chats are left"):
        data.setup("fit")
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        preference_data(preference_module(), chats=[source(talks(2))]).setup("fit")


def test_inspect_shows_chats_with_their_trained_tokens(tmp_path, capsys):
    messages = [{"role": "user", "content": "order"}, {"role": "assistant", "content": "please reply"}]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"id": "a", "messages": messages}, *talks(3)])
    given = f'--data.init_args.chats=[{{"path": "{path}"}}]'
    main(["--config", "configs/preference/tiny.yaml", given, "--number", "1"])
    pair, _, chat = capsys.readouterr().out.partition("chats/a chat")
    assert "train-0 chosen" in pair and "train-1" not in pair and "chats/" not in chat
    assert "[p][lease][ reply][<|im_end|>]" in chat
