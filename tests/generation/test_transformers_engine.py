import pytest
import torch
from transformers import GenerationConfig

from lit_alignment.errors import ConfigError
from lit_alignment.generation import transformers_engine
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.head import base_model
from lit_alignment.models.stop_rule import StopRule, stop_rule
from tests.helpers import encoder, generate, record, sft_module

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17]]
NEVER = StopRule([2], [])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return sft_module().load_model()


def slow_greedy(model, prompt, number):
    """One token at a time, without a cache, a batch or padding."""
    model.eval()
    ids, logprob = list(prompt), 0.0
    for _ in range(number):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprob += float(scores.max())
        if ids[-1] == 2:
            break
    return ids[len(prompt) :], logprob


def test_batched_greedy_answers_equal_a_slow_loop(model, tokenizer):
    settings = DecodingConfig(max_new_tokens=12, logprobs=True, skip_special_tokens=False)
    found = generate(model, tokenizer, PROMPTS, settings, NEVER)
    assert model.training  # the model is left as it was
    for prompt, answers in zip(PROMPTS, found, strict=True):
        ids, logprob = slow_greedy(model, prompt, 12)
        assert answers[0].text == tokenizer.decode(ids)
        assert answers[0].num_tokens == len(ids) and answers[0].finish_reason == ("stop" if ids[-1] == 2 else "length")
        assert answers[0].logp == pytest.approx(logprob, rel=1e-4)


def test_batch_composition_does_not_change_answers(model, tokenizer):
    settings = DecodingConfig(max_new_tokens=8)
    together = generate(model, tokenizer, PROMPTS, settings, NEVER)
    alone = [generate(model, tokenizer, [prompt], settings, NEVER)[0] for prompt in PROMPTS]
    assert [a[0].text for a in together] == [a[0].text for a in alone]


def test_several_answers_belong_to_their_prompts(model, tokenizer):
    settings = DecodingConfig(max_new_tokens=6, temperature=1.0, num_return_sequences=3, remove_prompt=False)
    found = generate(model, tokenizer, PROMPTS, settings, NEVER)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        assert len(answers) == 3
        assert all(answer.text.startswith(tokenizer.decode(prompt)) for answer in answers)
    assert len({answer.text for answers in found for answer in answers}) > 8


@pytest.mark.parametrize("lora", [False, True])
def test_a_prompt_is_read_once_for_all_its_answers_which_stay_the_same(lora, tokenizer, monkeypatch):
    torch.manual_seed(0)
    model = sft_module(lora).load_model()
    read: list[int] = []
    embeddings = base_model(model).get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    settings = DecodingConfig(max_new_tokens=5, temperature=1.0, num_return_sequences=4)
    found = generate(model, tokenizer, PROMPTS, settings, NEVER)
    number, width = len(PROMPTS), max(map(len, PROMPTS))
    assert read[:2] == [number * (width - 1), number * 4] and sum(read) <= number * (width - 1 + 4 * 5)
    monkeypatch.setattr(transformers_engine, "_read_once", lambda *_: {})
    read.clear()
    assert generate(model, tokenizer, PROMPTS, settings, NEVER) == found
    assert read[0] == number * 4 * width  # as generate does it


def test_sampling_repeats_under_its_seed_and_not_under_another(model, tokenizer):
    def sample(seed):
        settings = DecodingConfig(max_new_tokens=8, temperature=1.0, seed=seed)
        return [a[0].text for a in generate(model, tokenizer, PROMPTS, settings, NEVER)]

    first = sample(1)
    torch.rand(7)  # what was drawn before does not matter
    assert sample(1) == first != sample(2)


def test_beams_find_an_answer_at_least_as_likely(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPTS, DecodingConfig(max_new_tokens=6, logprobs=True), NEVER)
    settings = DecodingConfig(max_new_tokens=6, num_beams=4, num_return_sequences=2, logprobs=True)
    beams = generate(model, tokenizer, PROMPTS, settings, NEVER)
    assert all(len(answers) == 2 for answers in beams)
    total = sum(answers[0].logp for answers in beams)
    assert total >= sum(answers[0].logp for answers in greedy) - 1e-4


def test_stop_string_ends_an_answer_and_is_left_out(model, tokenizer):
    plain = generate(model, tokenizer, [PROMPTS[0]], DecodingConfig(max_new_tokens=12), NEVER)[0][0]
    stop = plain.text[6:9]
    settings = DecodingConfig(max_new_tokens=12, stop_strings=[stop])
    found = generate(model, tokenizer, PROMPTS, settings, NEVER)[0][0]
    assert found.text == plain.text[: plain.text.index(stop)]
    assert found.finish_reason == "stop" and found.num_tokens < plain.num_tokens


def test_repetition_penalty_lowers_repetition(model, tokenizer):
    def distinct(penalty):
        settings = DecodingConfig(max_new_tokens=40, repetition_penalty=penalty, skip_special_tokens=False)
        return len(set(tokenizer(generate(model, tokenizer, PROMPTS[:1], settings, NEVER)[0][0].text).input_ids))

    assert distinct(5.0) > distinct(1.0)


def test_stop_rule_takes_what_was_trained(tokenizer):
    assert stop_rule(tokenizer, encoder(tokenizer).end_of_turn()) == StopRule([2], [])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert stop_rule(tokenizer, encoder(tokenizer).end_of_turn()) == StopRule([2, eot], [])
    plain = tokenizer("</RS>", add_special_tokens=False).input_ids
    assert stop_rule(tokenizer, plain) == StopRule([2], ["</RS>"])


def test_prompt_ids_of_predict_are_those_of_training(tokenizer):
    enc = encoder(tokenizer)
    conversation = record("Where is it?", "There.", "Where?", "Here.")
    prompt = enc.encode_prompt(conversation).input_ids
    assert enc.encode(conversation).input_ids[: len(prompt)] == prompt
    assert prompt == tokenizer.apply_chat_template(
        conversation.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"num_return_sequences": 3}, "3 answers to a prompt need temperature above 0"),
        ({"stop_strings": [""]}, "empty string"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DecodingConfig(**settings)


def test_settings_that_come_with_the_base_decide_nothing(model, tokenizer):
    """Those that the configuration has no name for, too."""
    plain = [slow_greedy(model, prompt, 12)[0] for prompt in PROMPTS]
    often = plain[0][0]
    own = {"no_repeat_ngram_size": 1, "suppress_tokens": [often], "begin_suppress_tokens": [often], "top_k": 3}
    config = GenerationConfig(**own, do_sample=True, temperature=9.0, min_new_tokens=2)
    model.generation_config = config
    answers = generate(model, tokenizer, PROMPTS, DecodingConfig(max_new_tokens=12), NEVER)
    assert [answer.token_ids for (answer,) in answers] == plain and any(len(set(ids)) < len(ids) for ids in plain)
    assert model.generation_config is config
