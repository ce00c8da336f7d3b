"""Vision-language models: exact losses, gradients of one big batch, answers, exports, and what they learn."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from lit_alignment.callbacks.export import Export
from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.multimodal.media import open_image
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.tools.export import main as export
from tests.helpers import (
    IMAGE,
    VISION,
    assert_same_gradients,
    base_model_folder,
    chats,
    picture,
    seen,
    sft_data,
    step_gradients,
    trainer,
    vlm_data,
    vlm_module,
)


def gradients(folder, records, lora=False, data=None, options=None, **settings):
    module = vlm_module(lora, **settings)
    return step_gradients(folder, module, vlm_data(module, records, **(data or {})), **(options or {}))


def slow_loss(module, data, rows):
    """Mean loss over the trained tokens, one conversation and one image at a time, with embeddings put in by hand."""
    losses = []
    tower, media = module.loaded_towers["image"], module.media["image"]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        embedded = module.network.get_input_embeddings()(ids).clone()
        place = 0
        for path in json.loads(row["media"])["image"]:
            pixels = module.shapes["image"].processors[0](open_image(path), return_tensors="pt")["pixel_values"]
            hidden = tower.encoders[0].model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
            for vector in tower.projector(hidden)[0]:
                while row["input_ids"][place] != media.token_id:
                    place += 1
                embedded[0, place] = vector
                place += 1
        logits = module.network(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, label] for t, label in enumerate(row["labels"]) if label != -100 and t > 0]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packing", [True, False])
def test_loss_is_that_of_embeddings_put_in_by_hand(packing, tmp_path):
    module = vlm_module(train_encoder=True)
    data = vlm_data(module, seen(tmp_path, 8), packing=packing, batch_size=8, tokens_per_batch=4096)
    found = step_gradients(tmp_path, module, data)
    loss = float(module._window_loss)
    module = vlm_module(train_encoder=True)
    module.load_model()
    module.load_towers()
    expected = slow_loss(module, data, [data.examples["train"][i] for i in range(8)])
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    others = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == others.keys()
    for name, gradient in others.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_one_big_batch(lora, tmp_path):
    """Micro-batches with several images, one, and none, against one batch of all."""
    records = seen(tmp_path, 8)
    one = gradients(tmp_path, records, lora, {"packing": False, "batch_size": 8})
    for data, accumulate in (
        ({"packing": False, "batch_size": 1}, 8),
        ({"packing": False, "batch_size": 3}, 3),
        ({"tokens_per_batch": 512}, 99),
    ):
        number = accumulate if accumulate < 99 else 12
        assert_same_gradients(gradients(tmp_path, records, lora, data, {"accumulate_grad_batches": number}), one)


def test_placeholders_are_never_trained_and_marks_around_them_are(tmp_path):
    image = picture(tmp_path / "a.png", 0)
    messages = [{"role": "user", "content": "show it"}, {"role": "assistant", "type": "image", "content": image}]
    module = vlm_module(image=replace(IMAGE, start="<img>", end="</img>"))
    data = vlm_data(module, [{"messages": messages}], packing=False)
    data.setup("fit")
    row = data.examples["train"][0]
    media = module.media["image"]
    trained = [label for label in row["labels"] if label != -100]
    assert row["input_ids"].count(media.token_id) == media.number == 16
    assert media.token_id not in trained
    assert {module.tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "</img>")} <= set(trained)


def test_what_learns_at_each_stage(tmp_path):
    records = seen(tmp_path, 4)
    projector = {"towers.image.projector.0.weight", "towers.image.projector.2.bias"}
    alone = gradients(tmp_path, records, train_language_model=False)
    assert projector <= alone.keys() and all(name.startswith("towers.image.projector.") for name in alone)
    with_adapters = gradients(tmp_path, records, lora=True)
    others = {name for name in with_adapters if not name.startswith("towers.")}
    assert projector <= with_adapters.keys() and all("lora_" in name or "token_adapter" in name for name in others)
    full = gradients(tmp_path, records, train_encoder=True)
    assert "model.lm_head.weight" in full and any(name.startswith("towers.image.encoders.") for name in full)


def test_each_part_has_its_learning_rate(tmp_path):
    module = vlm_module(train_encoder=True, projector_learning_rate=0.5, encoder_learning_rate=0.25)
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, vlm_data(module, seen(tmp_path, 4)))
    rates = {id(p): group["lr"] for group in runner.optimizers[0].param_groups for p in group["params"]}
    tower = module.loaded_towers["image"]
    assert {rates[id(p)] for p in tower.projector.parameters()} == {0.5}
    assert {rates[id(p)] for p in tower.encoders.parameters() if p.requires_grad} == {0.25}
    assert {rates[id(p)] for p in module.network.parameters()} == {1e-2}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image": None}, "sees nothing: set model.image"),
        ({"image": replace(IMAGE, tokens_per_item=9)}, "tokens_per_item is 9, but the projector makes 16"),
        ({"image": replace(IMAGE, projector=ProjectorConfig("mlp", num_tokens=4))}, "one embedding of each of the"),
        ({"image": replace(IMAGE, cache="c"), "train_encoder": True}, "train_encoder is true, but the features"),
        ({"image": replace(IMAGE, encoders=[replace(VISION, layer=-9)])}, "layer is -9, and there are 3 hidden"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        vlm_module(**settings)


def test_data_module_of_another_method_is_refused(tmp_path):
    """It would leave out the images without a word."""
    module = vlm_module()
    with pytest.raises(ConfigError, match="lit_alignment.VLMDataModule is needed here, not a SFTDataModule"):
        trainer(tmp_path).fit(module, sft_data(module, chats(2)))


# Answers.


def answers(module, data, items, settings):
    return module.predict_step(PromptBatch(items), 0)["greedy"] if settings is None else module.respond(items, settings)


@pytest.fixture
def asked(tmp_path):
    """A module with prompts, some of which have images."""
    module = vlm_module(generation={"greedy": DecodingConfig(max_new_tokens=6)})
    data = vlm_data(module, seen(tmp_path, 6), seen(tmp_path, 6))
    runner = trainer(tmp_path)
    runner.fit(module, data)
    data.setup("predict")
    rows = data.examples["predict"]
    return module, data, [data.predict_item(rows[i], i) for i in range(len(rows))]


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_in_a_batch_are_those_of_each_alone(asked, beams):
    module, _, items = asked
    settings = DecodingConfig(max_new_tokens=6, num_beams=beams, num_return_sequences=beams, logprobs=True)
    together = module.respond(items, settings)
    for item, response in zip(items, together, strict=True):
        alone = module.respond([item], settings)[0]
        assert [each.text for each in alone.completions] == [each.text for each in response.completions]
        logps = [each.logp for each in response.completions]
        assert [each.logp for each in alone.completions] == pytest.approx(logps, abs=1e-3)


def test_answer_depends_on_the_image(asked, tmp_path):
    module, data, items = asked
    item = next(item for item in items if item.media["image"])
    settings = DecodingConfig(max_new_tokens=4, logprobs=True)
    paths = [picture(tmp_path / f"other{i}.png", 1000 + i) for i, _ in enumerate(item.media["image"])]
    other = replace(item, media={"image": paths})
    first, second = (module.respond([each], settings)[0].completions[0] for each in (item, other))
    assert first.logp != second.logp


def test_prompt_whose_image_has_changed_is_answered_again(asked, tmp_path):
    module, data, items = asked
    wanted = next(item for item in items if item.media["image"])
    path = wanted.media["image"][0]
    answered = []
    module.respond = lambda items, decoding, respond=module.respond: answered.extend(items) or respond(items, decoding)

    def predict():
        answered.clear()
        writer = PredictionWriter(str(tmp_path / "out"))
        trainer(tmp_path, callbacks=[writer]).predict(module, data, return_predictions=False)
        return [item.id for item in answered]

    assert len(predict()) == len(items)
    Path(path).unlink()
    picture(Path(path), 1000)
    assert predict() == [item.id for item in items if path in item.media["image"]]
    assert predict() == []


def test_placeholder_is_never_generated(asked):
    module, _, items = asked
    token = module.media["image"].token_id
    with torch.no_grad():  # the model would say nothing else
        module.network.lm_head.weight[token] = 100 * module.network.lm_head.weight.abs().max()
    settings = DecodingConfig(max_new_tokens=8, skip_special_tokens=False, temperature=1.0)
    for response in module.respond(items, settings):
        assert "<image>" not in response.completions[0].text


# Exports.


@pytest.mark.parametrize("lora", [False, True])
def test_export_is_a_llava_with_the_same_logits(lora, tmp_path):
    base = base_model_folder(tmp_path / "base")
    module = vlm_module(lora, base, image=replace(IMAGE, encoders=[replace(VISION, layer=-2)]))
    records = seen(tmp_path, 6)
    runner = trainer(tmp_path, max_steps=2, enable_checkpointing=True, callbacks=[Export()])
    runner.fit(module, vlm_data(module, records, packing=False, batch_size=2))
    folder = next(tmp_path.rglob("export"))
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    image = Image.open(picture(tmp_path / "x.png", 5))
    inputs = processor(images=image, text="order <image> please", return_tensors="pt")
    token = module.media["image"].token_id
    assert int((inputs["input_ids"] == token).sum()) == module.media["image"].number
    with torch.no_grad():
        found = llava(**inputs).logits
        data = vlm_data(module, records)
        pixels = data.media["image"].reader.read(str(tmp_path / "x.png"))
        torch.testing.assert_close(inputs["pixel_values"][0], pixels[0])
        expected = expected_logits(module, inputs["input_ids"], pixels[0][None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def expected_logits(module, input_ids, pixels):
    embedded = module.network.get_input_embeddings()(input_ids)
    features = module.eval().loaded_towers["image"]([pixels])
    where = (input_ids == module.media["image"].token_id)[..., None]
    return module.network(inputs_embeds=embedded.masked_scatter(where, features)).logits


def test_projector_of_an_export_can_be_taken_up(tmp_path):
    """Where it cannot be a LLaVA the projector stands beside the language model, and is a projector's first weights."""
    image = replace(IMAGE, projector=ProjectorConfig("perceiver", num_tokens=5, hidden_size=32))
    module = vlm_module(image=image)
    runner = trainer(tmp_path, max_steps=1, enable_checkpointing=True, callbacks=[Export()])
    runner.fit(module, vlm_data(module, seen(tmp_path, 4)))
    file = next(tmp_path.rglob("export")) / "media/image/projector.safetensors"
    again = vlm_module(image=replace(image, projector=replace(image.projector, weights=str(file))))
    again.load_model()
    again.load_towers()
    for name, value in module.loaded_towers["image"].projector.state_dict().items():
        torch.testing.assert_close(again.loaded_towers["image"].projector.state_dict()[name], value)


# Learning.


@pytest.mark.slow
def test_answers_that_depend_on_the_image_alone_are_learned(tmp_path):
    """Eight pictures, one question: nothing but the picture tells which answer is right."""
    names = ["order", "billing", "product", "repair", "urgent", "kitchen", "please", "work"]
    records = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": picture(tmp_path / f"{name}.png", i)}]},
                {"role": "assistant", "content": name},
            ]
        }
        for i, name in enumerate(names)
    ]
    falling = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup=0)  # so that the last steps settle
    module = vlm_module(generation={"greedy": DecodingConfig(max_new_tokens=8)}, optimizer=falling)
    data = vlm_data(module, records, records, encoding=EncodingConfig(max_length=64))
    trainer(tmp_path, max_epochs=80).fit(module, data)
    data.setup("predict")
    items = [data.predict_item(data.examples["predict"][i], i) for i in range(8)]
    found = [response.completions[0].text for response in module.respond(items, DecodingConfig(max_new_tokens=8))]
    assert found == names


@pytest.mark.parametrize("settings", [{}, {"lora": True}, {"train_language_model": False}, {"train_encoder": True}])
def test_checkpoint_becomes_a_llava_whose_logits_are_compared(settings, tmp_path, capsys):
    base = base_model_folder(tmp_path / "base")
    module = vlm_module(path=base, **settings)
    saver = ModelCheckpoint(tmp_path, filename="saved", save_last=False)
    runner = trainer(tmp_path, max_steps=2, enable_checkpointing=True, callbacks=[saver])
    runner.fit(module, vlm_data(module, seen(tmp_path, 6), packing=False, batch_size=2))
    export([saver.best_model_path, "--out", str(tmp_path / "llava"), "--dtype", "float32"])
    said = capsys.readouterr().out
    assert "prompts, without and with images: largest difference" in said and f"LLaVA: {tmp_path / 'llava'}" in said
    found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").state_dict()
    projector = module.loaded_towers["image"].projector
    torch.testing.assert_close(found["model.multi_modal_projector.linear_1.weight"], projector[0].weight.detach())


def test_checkpoint_that_is_no_llava_is_written_with_its_projector_beside(tmp_path, capsys):
    base = base_model_folder(tmp_path / "base")
    module = vlm_module(path=base, image=replace(IMAGE, projector=ProjectorConfig("linear")))
    saver = ModelCheckpoint(tmp_path, filename="saved", save_last=False)
    runner = trainer(tmp_path, max_steps=1, enable_checkpointing=True, callbacks=[saver])
    runner.fit(module, vlm_data(module, seen(tmp_path, 4)))
    export([saver.best_model_path, "--out", str(tmp_path / "out")])
    assert "no LLaVA folder, since its projector is not an mlp of depth 2" in capsys.readouterr().out
    assert (tmp_path / "out/media/image/projector.safetensors").is_file()
