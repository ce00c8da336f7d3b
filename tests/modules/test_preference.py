"""Preference optimisation: the reference, what a step is a mean of, KTO's estimate over the step, what is logged."""

import math
import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lit_alignment import AdapterConfig, CherryPicks, DecodingConfig, LossConfig
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.errors import ConfigError
from lit_alignment.losses.pairs import Pairs, ResponseLogps, pair_loss
from lit_alignment.models.adapters import save_adapter
from lit_alignment.models.head import base_model
from lit_alignment.models.reference import adapters_off, quiet_logps
from lit_alignment.training.preference_checks import what_to_say
from lit_alignment.training.preference_reference import reference_of
from tests.helpers import (
    Seen,
    base_model_folder,
    judged,
    pairs,
    preference_data,
    preference_module,
    sft_data,
    sft_module,
    step_gradients,
    trainer,
)
from tests.helpers.ranks import run_on_ranks

DROPOUT = {"attention_dropout": 0.3}
LAYOUTS = {
    "shared": {"tokens_per_batch": 8192},
    "packed": {"tokens_per_batch": 8192, "share_prompts": False},
    "padded": {"packing": False, "batch_size": 16},
}


def whole_logps(module, prompt, response):
    """Sum and number of the log-probabilities of one response's tokens, by transformers' own forward pass."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    asked, answered = (
        module.tokenizer.apply_chat_template(part, add_generation_prompt=ask, return_dict=False)
        for part, ask in ((messages[:1], True), (messages, False))
    )
    end = module.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answered = answered[: len(answered) - answered[::-1].index(end)]  # the line end behind it is nobody's
    ids = torch.tensor([answered])
    logps = module.network(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(asked) - 1 :, 0]


def fitted(folder, module, data, callbacks=(), **options):
    run = trainer(folder, callbacks=list(callbacks), log_every_n_steps=1, **options)
    run.fit(module, data)
    return run


def one_adapter(folder):
    """A base with an adapter that was trained a little."""
    base = base_model_folder(folder / "base")
    module = preference_module(base, lora=True)
    fitted(folder, module, preference_data(module, pairs(6)), max_epochs=3)
    save_adapter(module.network, folder / "adapter")
    return base, str(folder / "adapter")


# The reference.


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_loss_is_ln_2_and_all_rewards_are_zero(tmp_path, layout, precision, lora):
    path = base_model_folder(tmp_path / "base", **DROPOUT)
    module = preference_module(path, lora)
    seen = Seen()
    run = fitted(
        tmp_path, module, preference_data(module, pairs(6), **LAYOUTS[layout]), [seen], max_steps=1, precision=precision
    )
    assert any(isinstance(each, nn.Module) and getattr(each, "attention_dropout", 1) == 0 for each in module.modules())
    assert seen.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["train/chosen_reward"] == logged["train/rejected_reward"] == logged["train/kl"] == 0.0
    assert logged["train/accuracy"] == 0.5


@pytest.mark.parametrize("kind", ["new adapter", "continued adapter", "full"])
def test_reference_is_the_model_before_training_and_stays_it(tmp_path, kind):
    adapter = None
    if kind == "continued adapter":
        base, folder = one_adapter(tmp_path)
        adapter = AdapterConfig(folder, trainable=True)
    else:
        base = base_model_folder(tmp_path / "base")
    module = preference_module(base, kind == "new adapter", adapter=adapter)
    data = preference_data(module, pairs(6), pairs(4, 1))
    run = trainer(tmp_path, max_steps=3)
    run.fit(module, data)
    batch = next(iter(data.val_dataloader()))
    found = module.judged_logps(batch)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    before = preference_module(base, kind == "new adapter", adapter=adapter)
    fresh = trainer(tmp_path)
    fresh.validate(before, preference_data(before, val=pairs(4, 1)), verbose=False)
    expected = before.judged_logps(batch)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert not torch.allclose(quiet_logps(module.network, batch), found)  # it did train
        assert torch.equal(quiet_logps(before.network, batch), found)  # the policy before training is the reference
    assert trained and not any("reference" in name for name in trained)


def test_second_adapter_costs_the_adapter_alone(tmp_path):
    base, folder = one_adapter(tmp_path)
    module = preference_module(base, adapter=AdapterConfig(folder, trainable=True))
    trainer(tmp_path, max_steps=1).fit(module, preference_data(module, pairs(4)))
    own = sum(p.numel() for p in module.parameters() if p.requires_grad)
    kept = sum(p.numel() for name, p in module.named_parameters() if ".reference." in name)
    assert kept == own > 0 and module.reference_model is None
    total = sum(p.numel() for p in module.parameters())
    assert total == sum(p.numel() for p in base_model(module.network).parameters())


def test_adapters_are_on_again_after_an_exception(tmp_path):
    module = preference_module(base_model_folder(tmp_path / "base"), lora=True)
    module.load_model()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        on = module.network(input_ids=ids).logits
        with pytest.raises(ZeroDivisionError), adapters_off(module.network):
            assert not torch.allclose(module.network(input_ids=ids).logits, on)
            raise ZeroDivisionError
        assert torch.equal(module.network(input_ids=ids).logits, on)
    assert any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("wanted", "losses", "peft", "message"),
    [
        ("none", ["sigmoid"], True, "sigmoid needs one. Set it to auto"),
        ("adapter_off", ["sigmoid"], False, "there are no adapters"),
        ("frozen_copy", ["simpo"], True, "simpo is compared with no reference. Remove it"),
        ("frozen_copy", ["sigmoid"], True, "use adapter_off"),
        ("auto", ["sigmoid", "kto"], True, "do not go together"),
        ("adapter_off", ["sigmoid"], "pissa", "change the base weights"),
    ],
)
def test_reference_that_does_not_fit_is_refused(wanted, losses, peft, message):
    config = LoraConfig(init_lora_weights="pissa" if peft == "pissa" else True) if peft else None
    with pytest.raises(ConfigError, match=message):
        reference_of(wanted, [LossConfig(name) for name in losses], config, None)


def test_adapters_that_change_the_base_are_compared_with_the_base_as_it_was(tmp_path):
    base = base_model_folder(tmp_path / "base")
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    module = preference_module(base, peft=peft)
    seen = Seen()
    fitted(tmp_path, module, preference_data(module, pairs(6), tokens_per_batch=8192), [seen], max_steps=1)
    assert seen.losses[0] == pytest.approx(math.log(2), abs=1e-6) and module.reference == "cached"


# The cached reference.


def values_of(folder, base, records=None, callbacks=(), reference="cached", cache="cache", resume=None, **settings):
    """Losses of a training of all weights, and the values of its validation."""
    module = preference_module(base, reference=reference, losses=[LossConfig("sigmoid", beta=0.5)])
    shape = {"tokens_per_batch": 512, "cache_dir": str(folder / cache)} | settings
    data = preference_data(module, records or pairs(6), pairs(4, 1), **shape)
    seen = Seen()
    run = trainer(folder, callbacks=[seen, *callbacks], max_epochs=3, enable_checkpointing=bool(callbacks))
    run.fit(module, data, ckpt_path=resume)
    return seen.losses, {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}


def files_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").glob("reference-*.arrow")}


def logps_by_id(folder, base, reference, dtype, **settings):
    """Log-probabilities of the validation's targets under the reference, by record."""
    module = preference_module(base, reference=reference)
    module.backbone = replace(module.backbone, dtype=dtype)
    data = preference_data(module, val=pairs(8, 1), **settings)
    found = {}

    def step(batch, stage):
        values = module.judged_logps(batch)
        parts = iter(torch.split(values, batch.lengths))
        for name in batch.ids:
            found[name] = torch.cat([next(parts), next(parts)])

    module.step = step
    module.stage_values = lambda stage: {}
    trainer(folder).validate(module, data, verbose=False)
    return torch.cat([found[name] for name in sorted(found)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_reference_is_the_one_computed_beside_whatever_its_batches(tmp_path, dtype):
    base = base_model_folder(tmp_path / "base")
    layouts = {name: {**shape, "cache_dir": str(tmp_path / name)} for name, shape in LAYOUTS.items()}
    beside = {name: logps_by_id(tmp_path, base, "frozen_copy", dtype, **shape) for name, shape in layouts.items()}
    rounding = (beside["padded"] - beside["packed"]).abs().max() if dtype == "bfloat16" else 0.0
    for name, shape in layouts.items():
        cached = logps_by_id(tmp_path, base, "cached", dtype, **shape)
        for other in beside.values():
            assert float((cached - other).abs().max()) <= max(1e-5, 3 * rounding)
        again = logps_by_id(tmp_path, base, "cached", dtype, **LAYOUTS["padded"] | {"cache_dir": str(tmp_path / name)})
        assert torch.equal(again, cached) and len(list((tmp_path / name).glob("reference-*"))) == 1
    assert beside["padded"].dtype == cached.dtype == torch.float32


def test_training_beside_a_cached_reference_is_that_beside_a_copy(tmp_path):
    base = base_model_folder(tmp_path / "base")
    expected = values_of(tmp_path, base, reference="frozen_copy")
    found = values_of(tmp_path, base)
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and len(found[0]) > 2
    assert found[1] == pytest.approx(expected[1], rel=1e-3) and "val/kl" in found[1]


@pytest.mark.parametrize("touched", ["weights", "records", "dtype", "attention", "template"])
def test_cached_reference_is_never_of_something_else(tmp_path, touched):
    base = base_model_folder(tmp_path / "base")
    values_of(tmp_path, base)
    before = files_in(tmp_path)
    settings, records = {}, None
    match touched:
        case "weights":
            file = tmp_path / "base/model.safetensors"
            state = load_file(file)
            state["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
            save_file(state, file, {"format": "pt"})
        case "records":
            records = [*pairs(5), pairs(6)[-1] | {"chosen": "something else"}]
        case "template":
            settings["encoding"] = EncodingConfig(max_length=512, ignore_system_prompt=False, add_stop=False)
    module = preference_module(base, reference="cached")
    if touched in ("dtype", "attention"):
        value = {"dtype": "bfloat16", "attention": "eager"}[touched]
        module.backbone = replace(module.backbone, **{touched: value})
    if touched == "template":
        module.tokenizer.chat_template = module.tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    data = preference_data(
        module,
        records or pairs(6),
        tokens_per_batch=512,
        cache_dir=str(tmp_path / "cache"),
        packing=touched != "attention",
        batch_size=6,
        **settings,
    )
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert len(files_in(tmp_path).keys() - before.keys()) == 1


def test_changed_byte_in_the_cache_is_noticed_and_computed_again(tmp_path, capsys):
    base = base_model_folder(tmp_path / "base")
    expected = values_of(tmp_path, base)
    for path in (tmp_path / "cache").glob("reference-*.arrow"):
        content = bytearray(path.read_bytes())
        content[-200] ^= 1
        path.write_bytes(content)
    before = files_in(tmp_path)
    assert values_of(tmp_path, base) == expected
    after = files_in(tmp_path)
    assert before.keys() == after.keys() and all(after[name] != before[name] for name in before)


@pytest.mark.parametrize("cache", ["cache", "lost"])
def test_resumed_training_has_the_same_reference(tmp_path, cache):
    base = base_model_folder(tmp_path / "base")
    whole = values_of(tmp_path, base)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    values_of(tmp_path, base, callbacks=[saver])
    before = files_in(tmp_path)
    resumed = values_of(tmp_path, base, resume=tmp_path / "saved/epoch=0-step=2.ckpt", cache=cache)
    assert resumed[0] == pytest.approx(whole[0][2:], abs=1e-6)
    assert resumed[1] == pytest.approx(whole[1], abs=1e-5)
    assert files_in(tmp_path) == before


def test_validation_of_a_new_file_after_training_is_against_the_model_before_it(tmp_path):
    base = base_model_folder(tmp_path / "base")
    found = []
    for reference in ("cached", "frozen_copy"):
        module = preference_module(base, reference=reference)
        data = preference_data(module, pairs(6), cache_dir=str(tmp_path / "cache"))
        run = fitted(tmp_path, module, data, max_epochs=3)
        new = preference_data(module, val=pairs(5, 7), cache_dir=str(tmp_path / "cache"))
        found += run.validate(module, new, verbose=False)
    assert found[0] == pytest.approx(found[1], abs=1e-5) and abs(found[0]["val/chosen_reward"]) > 1e-3


def cached_on_rank(folder, base):
    module = preference_module(base, reference="cached")
    data = preference_data(module, pairs(6), pairs(5, 1), tokens_per_batch=512, cache_dir=str(folder / "shared"))
    run = trainer(folder, max_steps=3, devices=2, strategy="ddp", log_every_n_steps=1)
    run.fit(module, data)
    if run.is_global_zero:
        torch.save({name: float(value) for name, value in run.callback_metrics.items()}, folder / "found.pt")


@pytest.mark.slow
def test_ranks_compute_the_cache_together(tmp_path):
    base = base_model_folder(tmp_path / "base")
    run_on_ranks(cached_on_rank, tmp_path, base)
    found = torch.load(tmp_path / "found.pt")
    assert len(list((tmp_path / "shared").glob("reference-*"))) == 2
    run_on_ranks(cached_on_rank, tmp_path, base)
    assert torch.load(tmp_path / "found.pt") == pytest.approx(found)
    module = preference_module(base, reference="frozen_copy")
    data = preference_data(module, val=pairs(5, 1), tokens_per_batch=512)
    (expected,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert expected["val/chosen_reward"] == 0.0 and found["val/chosen_reward"] != 0.0
    assert found["val/chosen_length"] == expected["val/chosen_length"]


# The loss of an optimizer step.


def slow_loss(module, reference, records, config):
    """Mean over the pairs, each response alone in a forward pass."""
    total = torch.zeros(())
    for record in records:
        sides = []
        for name in ("chosen", "rejected"):
            policy = whole_logps(module, record["prompt"], record[name])
            with torch.no_grad():
                before = whole_logps(reference, record["prompt"], record[name])
            number = torch.tensor([len(policy)])
            sides.append(ResponseLogps(policy.sum()[None], before.sum()[None], number))
        total = total + pair_loss(config, Pairs(*sides, torch.tensor([record["margin"]]))).sum()
    return total / len(records)


@pytest.mark.parametrize("name", ["sigmoid_margin", "ipo", "rpo", "simpo", "orpo"])
def test_gradient_equals_a_slow_loop_over_single_responses(tmp_path, name):
    config = LossConfig(name)
    module = preference_module(losses=[config])
    found = step_gradients(tmp_path, module, preference_data(module, pairs(5), tokens_per_batch=8192))
    module = preference_module(losses=[config])
    module.load_model().eval()
    reference = preference_module()
    reference.load_model().eval()
    slow_loss(module, reference, pairs(5), config).backward()
    for own, parameter in module.named_parameters():
        torch.testing.assert_close(found[own], parameter.grad, rtol=1e-4, atol=1e-6)


def changed(module, by=0.02):
    """Move the policy away from its reference, so that losses and gradients of all kinds are there."""
    load = module.load_model

    def moved(*arguments, **options):
        network = load(*arguments, **options)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(by * torch.randn(parameter.shape, generator=generator))
        return network

    module.load_model = moved
    return module


def test_tokens_beyond_the_shorter_response_count_with_their_weight(tmp_path):
    """ld_dpo by hand: per-token log-probabilities of policy and reference, cut where the shorter response ends."""
    config, base = LossConfig("ld_dpo", beta=0.7, tail_weight=0.3), base_model_folder(tmp_path / "base")
    module = changed(preference_module(base, losses=[config], reference="frozen_copy"))
    found = step_gradients(tmp_path, module, preference_data(module, pairs(5), tokens_per_batch=8192))
    policy, reference = changed(preference_module(base)), preference_module(base)
    policy.load_model().eval()
    reference.load_model().eval()
    total, lengths = torch.zeros(()), []
    for record in pairs(5):
        ratios = []
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                before = whole_logps(reference, record["prompt"], record[side])
            ratios.append(whole_logps(policy, record["prompt"], record[side]) - before)
        shorter = min(map(len, ratios))
        chosen, rejected = (ratio[:shorter].sum() + 0.3 * ratio[shorter:].sum() for ratio in ratios)
        total = total - torch.nn.functional.logsigmoid(0.7 * (chosen - rejected)) / 5
        lengths.append(len(ratios[0]) - len(ratios[1]))
    assert min(lengths) < 0 < max(lengths)
    total.backward()
    for own, parameter in policy.named_parameters():
        torch.testing.assert_close(found[own], parameter.grad, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "kto_pair", "mpo"])
@pytest.mark.parametrize(
    "settings",
    [{"tokens_per_batch": 512}, {"tokens_per_batch": 512, "share_prompts": False}, {"packing": False, "batch_size": 2}],
    ids=["shared", "packed", "padded"],
)
def test_gradient_is_the_same_for_any_layout_and_split_into_micro_batches(tmp_path, settings, name):
    make = dict(losses=[LossConfig(name)], lora=True)
    path = base_model_folder(tmp_path / "base")
    one = changed(preference_module(path, **make))
    expected = step_gradients(tmp_path, one, preference_data(one, pairs(9), packing=False, batch_size=9))
    many = changed(preference_module(path, **make))
    found = step_gradients(tmp_path, many, preference_data(many, pairs(9), **settings), accumulate_grad_batches=9)
    assert expected and found.keys() == expected.keys()
    for own, gradient in expected.items():
        difference = (found[own] - gradient).abs().max()
        assert float(difference) <= 1e-5 * float(gradient.abs().max()), own


def on_rank(folder, path, name, ranks):
    of_responses = name == "kto"
    module = changed(preference_module(path, lora=True, losses=[LossConfig(name)]))
    records = judged(9) if of_responses else pairs(9)
    data = preference_data(
        module, records, records, packing=False, batch_size=2, kind="outcomes" if of_responses else "preferences"
    )
    options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    run = trainer(folder, max_steps=3, log_every_n_steps=1, accumulate_grad_batches=4 // ranks, **options)
    run.fit(module, data)
    if run.is_global_zero:
        torch.save({name: float(value) for name, value in run.callback_metrics.items()}, folder / f"{ranks}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "kto", "kto_pair"])
def test_two_ranks_train_and_log_what_one_does(tmp_path, name):
    path = base_model_folder(tmp_path / "base")
    for ranks in (1, 2):
        run_on_ranks(on_rank, tmp_path, path, name, ranks, ranks=ranks)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert one.keys() == two.keys() and {"train/loss", "train/margin", "val/loss", "val/kl"} <= one.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("make", [{}, {"lora": True}, {"losses": [LossConfig("kto")]}], ids=["full", "lora", "kto"])
def test_checkpointed_activations_change_no_gradient(tmp_path, make):
    base, found = base_model_folder(tmp_path / "base"), []
    for checkpointed in (False, True):
        module = changed(preference_module(base, **make))
        module.backbone = replace(module.backbone, gradient_checkpointing=checkpointed)
        records = (judged(5), {"kind": "outcomes"}) if "losses" in make else (pairs(5), {})
        found.append(step_gradients(tmp_path, module, preference_data(module, records[0], **records[1])))
    plain, again = found
    assert plain and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_dropout_that_has_no_effect_is_said(tmp_path, recwarn):
    base = base_model_folder(tmp_path / "base")
    for rate, said in ((0.25, 1), (0.0, 0)):
        recwarn.clear()
        peft = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=rate, task_type="CAUSAL_LM")
        module = preference_module(base, peft=peft)
        trainer(tmp_path, max_steps=1).fit(module, preference_data(module, pairs(4)))
        assert sum("dropout of 0.25 is off" in str(each.message) for each in recwarn) == said


def test_weights_of_losses_are_of_their_means(tmp_path):
    def loss(*losses):
        module = changed(preference_module(losses=list(losses), reference="auto"))
        (result,) = trainer(tmp_path).validate(module, preference_data(module, val=pairs(5)), verbose=False)
        return result

    dpo, sft = loss(LossConfig("sigmoid"))["val/loss"], loss(LossConfig("sft"))["val/loss"]
    both = loss(LossConfig("sigmoid", weight=0.5), LossConfig("sft", weight=0.2))
    assert both["val/loss"] == pytest.approx(0.5 * dpo + 0.2 * sft, rel=1e-5)
    assert both["val/sigmoid_loss"] == pytest.approx(dpo) and both["val/sft_loss"] == pytest.approx(sft)


def test_ranking_compares_all_responses_or_the_best_with_the_worst(tmp_path):
    ranking = {"prompt": "order", "candidates": ["yes please", "no", "repair it now"], "ranking": [2, 3, 1]}
    for compared, number in (("all_pairs", 3), ("best_and_worst", 1)):
        module = preference_module()
        data = preference_data(module, [ranking], compared=compared)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert len(batch.chosen) == number == batch.window_weight
        assert all(batch.scores[batch.chosen] > batch.scores[batch.rejected])
    assert (batch.chosen.item(), batch.rejected.item()) == (2, 1)


# What is encoded.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_follow_the_prompt_ids_of_predict_and_count_to_their_end_of_turn(layout):
    module = preference_module()
    data = preference_data(module, pairs(5), pairs(5), **LAYOUTS[layout])
    data.setup("fit")
    data.setup("predict")
    asked = {item.id: item.input_ids for batch in data.predict_dataloader() for item in batch.items}
    for row in data.examples["train"].rows(range(5)):
        assert row["prompt"] == asked[row["id"]]
        for response, (begin, end) in zip(row["responses"], row["trained"], strict=True):
            text = module.tokenizer.decode(response[begin:end])
            assert begin == 0 and text.count("<|im_end|>") == 1 and text.strip().endswith("<|im_end|>")
    batch = next(iter(data.train_dataloader()))
    assert batch.num_trained == sum(batch.lengths) == int(batch.counts.sum())


def test_predict_answers_conversations_too():
    """As sample tables of converted configurations do: with any label, and whoever speaks last."""
    question, answer = {"role": "user", "content": "order"}, {"role": "assistant", "content": "repair"}
    chats = [{"messages": [question], "label": "urgent"}, {"messages": [question, answer]}]
    data = preference_data(preference_module(), pairs(1), chats)
    data.setup("predict")
    items = [item for batch in data.predict_dataloader() for item in batch.items]
    assert [item.reference for item in items] == [None, "repair"]
    assert items[0].input_ids == items[1].input_ids


def test_of_a_response_of_several_turns_the_assistant_s_count():
    turn = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}
    record = {"prompt": "order", "chosen": [*turn, {**turn[0], "content": "please"}], "rejected": "no"}
    module = preference_module()
    data = preference_data(module, [record])
    data.setup("fit")
    (row,) = data.examples["train"].rows([0])
    texts = [
        module.tokenizer.decode(response[begin:end])
        for response, spans in zip(row["responses"], row["trained"], strict=True)
        for begin, end in zip(spans[::2], spans[1::2], strict=True)
    ]
    assert [text.split("<")[0] for text in texts] == ["yes", "please", "no"]
    assert "why" in module.tokenizer.decode(row["responses"][0])


def test_long_prompts_are_shortened_once_and_no_response_is_cut():
    record = {"id": "a", "chosen": "yes", "rejected": " ".join(["no"] * 30)}
    record["prompt"] = [{"role": "user", "content": "order " * 40}, *[{"role": "assistant", "content": "so"}] * 1]
    record["prompt"] += [{"role": "user", "content": "reply"}]
    module = preference_module()
    data = preference_data(module, [record], encoding=EncodingConfig(max_length=96), tokens_per_batch=512)
    data.setup("fit")
    (row,) = data.examples["train"].rows([0])
    assert len(row["prompt"]) + max(map(len, row["responses"])) <= 96
    assert all(spans[-1] >= len(response) - 1 for spans, response in zip(row["trained"], row["responses"], strict=True))


# KTO.


def batches_of(records, accumulate=3, batch_size=2, ranks=1):
    """Batches of the first epoch on each rank, with what the KL estimate is taken over."""
    module = preference_module(losses=[LossConfig("kto")])
    data = preference_data(module, records, kind="outcomes", packing=False, batch_size=batch_size)
    data.baseline = "mismatched"
    data.setup("fit")
    plan = data.plan("train")
    rows = data.examples["train"]
    return data, [
        [data._batch(rows, planned) for planned in plan.batches(plan.groups(0), rank, ranks, accumulate // ranks)]
        for rank in range(ranks)
    ]


def mismatched(data, batches):
    """Texts of all sequences that estimates are taken over, by the first micro-batch of each step."""
    found = []
    for batch in batches:
        if batch.baseline:
            found.append([])
        for each in batch.baseline:
            if not each.dummy:
                masks = each.attention_mask.bool()
                found[-1] += [data.tokenizer.decode(ids[mask]) for ids, mask in zip(each.input_ids, masks, strict=True)]
    return [sorted(step) for step in found]


def test_estimate_is_over_other_responses_of_the_whole_step_under_any_split():
    records = judged(11)
    expected = None
    for accumulate, size, ranks in ((3, 2, 1), (6, 1, 1), (1, 6, 1), (6, 1, 2)):
        data, batches = batches_of(records, accumulate, size, ranks)
        per_rank = [mismatched(data, own) for own in batches]
        found = [sorted(text for own in step for text in own) for step in zip(*per_rank, strict=True)]
        expected = expected or found
        assert found == expected and [len(step) for step in found] == [6, 5]
        assert sum(bool(batch.baseline) for batch in batches[0]) == 2  # known before the first backward pass
    texts = {(r["prompt"], r["completion"]) for r in records}
    own = {f"user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<" for prompt, answer in texts}
    assert not any(text in whole for step in expected for whole in step for text in own)


def test_loss_and_estimate_equal_a_slow_loop_over_single_responses(tmp_path):
    """KTO by hand: z is the mean log-ratio of the mismatched texts, and each response is judged against it."""
    records, base = judged(6), base_model_folder(tmp_path / "base")
    changed(preference_module(base)).load_model().save_pretrained(base)  # back from there all becomes likelier: z > 0
    make = {"losses": [LossConfig("kto", beta=0.5, desirable_weight=1.5)]}
    module = changed(preference_module(base, **make), -0.02)
    data = preference_data(module, records, kind="outcomes", packing=False, batch_size=2)
    found = step_gradients(tmp_path, module, data, accumulate_grad_batches=3)
    policy, reference = changed(preference_module(base), -0.02), preference_module(base)
    policy.load_model().eval()
    reference.load_model().eval()

    def ratio(prompt, response):
        with torch.no_grad():
            before = whole_logps(reference, prompt, response).sum()
        return whole_logps(policy, prompt, response).sum() - before

    data, (batches,) = batches_of(records)
    (texts,) = mismatched(data, batches)
    parts = [re.search(r"user\n(.*)<\|im_end\|>.*assistant\n(.*)<\|im_end\|>", text, re.DOTALL) for text in texts]
    with torch.no_grad():
        z = torch.stack([ratio(*part.groups()) for part in parts]).mean()
    assert len(parts) == 6 and float(z) > 0.1
    total = torch.zeros(())
    for record in records:
        difference = 0.5 * (ratio(record["prompt"], record["completion"]) - z)
        total = total + (1.5 * (1 - difference.sigmoid()) if record["label"] else 1 - (-difference).sigmoid()) / 6
    total.backward()
    for own, parameter in policy.named_parameters():
        torch.testing.assert_close(found[own], parameter.grad, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()))


def test_no_partner_answers_the_same_prompt():
    records = judged(2) + [{"id": f"x{i}", "prompt": "order", "completion": f"{i}", "label": 1} for i in range(4)]
    data, (batches,) = batches_of(records, 1, 6)
    (texts,) = mismatched(data, batches)
    answers = [text.split("assistant\n")[1].split("<")[0] for text in texts if "user\norder<" in text]
    assert len(answers) == 4 and not set(answers) & {"0", "1", "2", "3"}
    same = [{**record, "id": f"y{i}", "completion": "yes"} for i, record in enumerate(judged(4))]
    data, (batches,) = batches_of(same, 1, 4)  # another prompt's response is one's own here
    assert mismatched(data, batches) == [[]]
    alone, (batches,) = batches_of(records[2:], 1, 4)
    assert mismatched(alone, batches) == [[]]  # nothing to estimate from: z is 0


@pytest.mark.parametrize("label", [0, 1])
def test_window_of_one_side_only_trains_with_the_estimate(tmp_path, label):
    records = [record | {"label": label} for record in judged(6)]
    module = changed(preference_module(losses=[LossConfig("kto")]))
    data = preference_data(module, records, kind="outcomes", packing=False, batch_size=1)
    run = fitted(tmp_path, module, data, max_steps=1, accumulate_grad_batches=6)
    assert math.isfinite(float(run.callback_metrics["train/loss"]))
    assert f"train/{'undesirable' if label else 'desirable'}_reward" not in run.callback_metrics


@pytest.mark.parametrize(("weight", "advised"), [(1.0, "to 0.50 up to 0.67"), (0.6, None)])
def test_unbalanced_responses_are_said_with_the_weights_that_help(tmp_path, weight, advised, caplog, recwarn):
    module = preference_module(losses=[LossConfig("kto", desirable_weight=weight)])  # 8 good, 4 bad
    fitted(tmp_path, module, preference_data(module, judged(12), kind="outcomes"), max_steps=1)
    assert f"8 good responses with weight {weight:g}, 4 bad ones with weight 1" in caplog.text
    warned = [str(each.message) for each in recwarn if "desirable_weight" in str(each.message)]
    assert len(warned) == (advised is not None) and all(advised in text for text in warned)


def test_margins_that_no_loss_reads_are_said(tmp_path, caplog):
    records = [{**record, "margin": None} if i == 2 else record for i, record in enumerate(pairs(4))]
    module = preference_module()
    fitted(tmp_path, module, preference_data(module, records), max_steps=1)
    assert "3 of 4 records have a margin, which sigmoid does not read: the order alone counts" in caplog.text
    assert "(losses that read it: sigmoid_margin, ddpo)" in caplog.text


def test_what_loss_and_accuracy_hide_is_said_once():
    first, said = {"chosen_logp": -10.0, "margin": 0.1}, set()
    assert what_to_say(first, {"chosen_logp": -9.0, "margin": 0.5, "length_correlation": 0.4}, 100, said) == []
    later = {"chosen_logp": -12.0, "margin": 0.5, "length_correlation": 0.8}
    assert what_to_say(first, later, 8, set())[0].startswith("the margin rises (0.1 to 0.5) while")
    (displaced, longer) = what_to_say(first, later, 100, said)
    assert "(-10 to -12 nats)" in displaced and "correlation 0.80" in longer
    assert what_to_say(first, later, 100, said) == []


def test_report_draws_what_is_logged(tmp_path):
    module = preference_module(generation={"greedy": DecodingConfig(max_new_tokens=2)})
    picks = CherryPicks(num_samples=1, generation=DecodingConfig(max_new_tokens=2))
    fitted(tmp_path, module, preference_data(module, pairs(4), pairs(4)), [picks], max_epochs=2)
    page = (tmp_path / "report.html").read_text()
    drawn = dict(re.findall('<svg [^>]*aria-label="([^:]*): ([^"]*)"', page))
    assert {"accuracy", "kl", "margin"} < drawn.keys() and re.fullmatch("train from .*, val from .*", drawn["loss"])
    assert re.findall("(train|val) ([a-z_]+) from", drawn["chosen_reward, rejected_reward"]) == [
        (stage, f"{answer}_reward") for stage in ("train", "val") for answer in ("chosen", "rejected")
    ]


def test_validation_inside_of_a_step_leaves_its_estimate_alone(tmp_path):
    base, losses = base_model_folder(tmp_path / "base"), []
    for interval in (6, 1):
        module = preference_module(base, lora=True, losses=[LossConfig("kto", beta=1.0)])
        data = preference_data(module, judged(12), judged(5, 1), kind="outcomes", packing=False, batch_size=2)
        seen = Seen()
        options = {"accumulate_grad_batches": 6, "val_check_interval": interval}
        trainer(tmp_path, callbacks=[seen], max_epochs=3, **options).fit(module, data)
        losses.append(seen.losses)
    assert losses[0] == losses[1] and len(set(losses[0])) > 6


def test_kinds_of_data_and_loss_must_agree(tmp_path):
    module = preference_module(losses=[LossConfig("kto")])
    with pytest.raises(ConfigError, match="kto is a loss of responses, and data.kind is preferences"):
        trainer(tmp_path).fit(module, preference_data(module, pairs(4)))
    module = preference_module()
    with pytest.raises(ConfigError, match="PreferenceDataModule is needed here, not a SFTDataModule"):
        trainer(tmp_path).fit(module, sft_data(sft_module(), pairs(0) or [{"prompt": "a", "completion": "b"}]))


def test_margin_that_a_loss_reads_and_a_record_lacks_is_refused_before_training(tmp_path):
    records = [{name: value for name, value in pairs(4)[0].items() if name != "margin"}, *pairs(4)[1:]]
    module = preference_module(losses=[LossConfig("sigmoid_margin")])
    with pytest.raises(ConfigError, match="1 of 4 records of data.train have none, the first is train/r0"):
        trainer(tmp_path).fit(module, preference_data(module, records, pairs(3)))


def test_pair_of_equal_responses_says_nothing_in_either_kind():
    equal = {"id": "a", "prompt": "order", "chosen": "yes", "rejected": "yes"}
    for kind in ("preferences", "outcomes"):
        module = preference_module()
        data = preference_data(module, [*pairs(2), equal], kind=kind)
        data.setup("fit")
        assert data.examples["train"].column("id").to_pylist() == ["r0", "r1"]


def test_training_prefers_what_is_chosen(tmp_path):
    module = preference_module(lora=True, path=base_model_folder(tmp_path / "base"))
    run = fitted(tmp_path, module, preference_data(module, pairs(8), pairs(8)), max_epochs=15)
    assert float(run.callback_metrics["val/accuracy"]) > 0.9 and float(run.callback_metrics["val/loss"]) < 0.4
