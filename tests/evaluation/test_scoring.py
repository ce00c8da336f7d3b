"""Scores of answers against slow loops, whatever the batch."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.evaluation.scoring import AnsweredPrompt, Scorer, answer_logps, read_documents
from lit_alignment.generation.reward_scorer import RewardScorer
from tests.helpers import ROOT, encoder, sft_module

QUESTION = [{"role": "user", "content": "the kitchen scale"}]
PROMPT = AnsweredPrompt(QUESTION, ["please reply", "order the kitchen repair now", ""], [True, False, True])


@pytest.fixture
def module():
    return sft_module()


def slow_logps(network, ids, labels):
    with torch.no_grad():
        logits = network.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logits[i - 1, ids[i]]) for i in range(1, len(ids)) if labels[i] != -100]


def test_logps_are_those_of_a_slow_loop_in_any_batch(module, tokenizer):
    network = module.load_model()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 17, 9, 30, 2):
        ids = torch.randint(3, 700, (length,), generator=generator).tolist()
        rows.append((ids, [-100] * (length // 2) + ids[length // 2 :]))
    rows.append(([], []))
    expected = [slow_logps(network, ids, labels) if ids else [] for ids, labels in rows]
    for batch_size in (1, 2, 8):
        found = answer_logps(network, rows, batch_size)
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_tokens_are_those_of_training_the_first_and_the_end_of_turn_included(module, tokenizer):
    scorer = Scorer(["perplexity"], encoder(tokenizer), module.load_model())
    (item,) = scorer.score([PROMPT])
    finished = len(tokenizer("please reply")["input_ids"]) + 1
    cut = len(tokenizer("order the kitchen repair now")["input_ids"])
    assert [len(logps) for logps in item.logps] == [finished, cut, 1]


def test_truncation_of_training_does_not_cut_what_is_scored(module, tokenizer):
    network = module.load_model()
    long = Scorer(["perplexity"], encoder(tokenizer), network).score([PROMPT])[0].logps
    short = Scorer(["perplexity"], encoder(tokenizer, max_length=4), network).score([PROMPT])[0].logps
    assert short == long


@pytest.mark.parametrize("switch", [{"train": True}, {"train": False}, {"weight": 2.0}, {"weight": 0.0}])
def test_loss_switches_of_earlier_messages_do_not_change_what_is_scored(switch, module, tokenizer):
    earlier = {"role": "assistant", "content": "order order"}
    scorer = Scorer(["perplexity"], encoder(tokenizer), module.load_model())
    plain, switched = (
        AnsweredPrompt([*QUESTION, m, *QUESTION], ["reply"], [True]) for m in (earlier, earlier | switch)
    )
    expected, found = scorer.score([plain, switched])
    assert found.logps[0] == pytest.approx(expected.logps[0], abs=1e-6)


def test_system_message_that_was_asked_with_is_scored_with(module, tokenizer):
    """`ignore_system_prompt` takes out the record's own; a source's `system_prompt` may stand in its place."""
    prompt = AnsweredPrompt([{"role": "system", "content": "be kind"}, *QUESTION], ["reply"], [True])
    network = module.load_model()
    (kept,) = Scorer(["perplexity"], encoder(tokenizer), network).score([prompt])
    (ignored,) = Scorer(["perplexity"], encoder(tokenizer, ignore_system_prompt=True), network).score([prompt])
    (without,) = Scorer(["perplexity"], encoder(tokenizer), network).score(
        [AnsweredPrompt(QUESTION, ["reply"], [True])]
    )
    assert ignored.logps == kept.logps != without.logps


def test_answer_without_tokens_has_no_utility(module, tokenizer):
    scorer = Scorer(["retrieval_utility"], encoder(tokenizer), module.load_model())
    prompt = AnsweredPrompt(QUESTION, ["", "reply"], [False, True], documents=["order urgent"])
    assert len(scorer.score([prompt])[0].document_utilities) == 1


def test_documents_are_texts_or_passages():
    assert read_documents(None, "f:1") == [] and read_documents(["a"], "f:1") == ["a"]
    passages = [{"id": "p1", "title": "Title", "text": "a"}, {"text": "b"}]
    assert read_documents(passages, "f:1") == ["Title\na", "b"]
    for value in ("a text", 3):
        with pytest.raises(RecordError, match="f:1: field 'documents' is a"):
            read_documents(value, "f:1")
    with pytest.raises(RecordError, match="f:1: documents: field 'text' is missing"):
        read_documents([{"title": "a"}], "f:1")


def test_kl_of_fresh_adapters_is_zero_and_of_changed_ones_is_not(tokenizer):
    module = sft_module(lora=True)
    network = module.load_model()
    scorer = Scorer(["kl"], encoder(tokenizer), network)
    (item,) = scorer.score([PROMPT])
    assert item.logps == item.base_logps
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (changed,) = scorer.score([PROMPT])
    assert changed.base_logps == item.base_logps and changed.logps != item.logps
    other = Scorer(["kl"], encoder(tokenizer), network, base=sft_module().load_model())
    (against,) = other.score([PROMPT])
    assert against.base_logps[0] == pytest.approx(item.base_logps[0], abs=1e-6)


def test_utility_of_documents_is_the_difference_of_cross_entropies(module, tokenizer):
    network = module.load_model()
    scorer = Scorer(["retrieval_utility"], encoder(tokenizer), network)
    prompt = AnsweredPrompt(QUESTION, ["please reply"], [True], documents=["order urgent", "billing"])
    (item,) = scorer.score([prompt])

    def entropy(context):
        content = f"{context}\n\n{QUESTION[0]['content']}" if context else QUESTION[0]["content"]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "please reply"}]
        from lit_alignment.data.encoding.messages import Record

        example = encoder(tokenizer).encode(Record("", messages, ""))
        logps = slow_logps(network, example.input_ids, example.labels)
        return -sum(logps) / len(logps)

    expected = [entropy("") - entropy(c) for c in ("order urgent", "billing", "order urgent\n\nbilling")]
    assert item.document_utilities == [pytest.approx(expected, abs=1e-5)]
    assert Scorer(["retrieval_utility"], encoder(tokenizer), network).score([PROMPT])[0].document_utilities == []


@pytest.fixture
def reward_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    config = LlamaConfig.from_pretrained(ROOT / "configs/tiny", num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_reward_is_the_raw_score_of_the_whole_conversation(reward_model):
    (item,) = Scorer(["reward"], reward=RewardScorer(reward_model)).score([PROMPT])
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    messages = [*QUESTION, {"role": "assistant", "content": "please reply"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    with torch.no_grad():
        assert item.rewards[0] == pytest.approx(float(model(input_ids=torch.tensor([ids])).logits[0, 0]), abs=1e-6)
    assert len(item.rewards) == 3


def test_what_a_metric_lacks_is_named(module, tokenizer, reward_model, tmp_path):
    network = module.load_model()
    with pytest.raises(ConfigError, match="need a model: give --model"):
        Scorer(["perplexity"])
    with pytest.raises(ConfigError, match="kl needs the base model"):
        Scorer(["kl"], encoder(tokenizer), network)
    with pytest.raises(ConfigError, match="reward needs a reward model"):
        Scorer(["reward"])
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(ROOT / "configs/tiny", num_labels=3)).save_pretrained(
        tmp_path / "three"
    )
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match="a reward model has one label, this one 3"):
        RewardScorer(str(tmp_path / "three"))
    silent = AutoTokenizer.from_pretrained(reward_model)
    silent.chat_template = None
    silent.save_pretrained(tmp_path / "silent")
    LlamaForSequenceClassification.from_pretrained(reward_model).save_pretrained(tmp_path / "silent")
    with pytest.raises(ConfigError, match="this reward model has no chat template"):
        RewardScorer(str(tmp_path / "silent"))


def test_adapters_are_on_again_after_scoring(tokenizer):
    module = sft_module()
    module.peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    network = module.load_model()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 20)[None]
    network.eval()
    before = network(input_ids=ids).logits
    Scorer(["kl"], encoder(tokenizer, EncodingConfig().template), network).score([PROMPT])
    assert torch.equal(network(input_ids=ids).logits, before)
