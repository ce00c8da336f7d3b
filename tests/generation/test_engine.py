"""What every engine promises: lazy streams, results in order, seeds, and the lines of predictions."""

import pytest
import torch

from lit_alignment.callbacks.samples.answers import CherryPicks
from lit_alignment.generation.engine import Completion, Engine, Images, Refusal, Request, prompt_seed, step_seed
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.models.head import scores_at
from lit_alignment.models.stop_rule import StopRule
from tests.helpers import chats, reward_model, sft_data, sft_module, trainer

GREEDY = DecodingConfig(max_new_tokens=4, logprobs=True)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [15], [16, 17], [18]]


class Backwards(Engine):
    """Answers the last request first, and refuses long ones."""

    def stream(self, requests):
        for request in reversed(list(requests)):
            short = len(request.token_ids) < 3
            yield request, [Completion([1], None, str(request.owner), "stop")] if short else Refusal("too long")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return sft_module().load_model()


def test_generate_has_the_order_of_the_requests():
    found = Backwards().generate([Request(prompt, GREEDY, owner=n) for n, prompt in enumerate(PROMPTS)])
    assert [each if isinstance(each, Refusal) else each[0].text for each in found] == [
        Refusal("too long"),
        Refusal("too long"),
        "2",
        "3",
        "4",
    ]


def test_requests_are_drawn_batch_by_batch(network, tokenizer):
    drawn = []

    def requests():
        for number, prompt in enumerate(PROMPTS):
            drawn.append(number)
            yield Request(prompt, GREEDY, owner=number)

    seen = []
    for request, (completion,) in TransformersEngine(network, tokenizer, batch_size=2).stream(requests()):
        seen.append((request.owner, len(drawn)))
        assert completion.num_tokens == len(completion.token_ids) == len(completion.logps) <= 4
    assert seen == [(0, 2), (1, 2), (2, 4), (3, 4), (4, 5)]


def test_requests_of_unlike_settings_are_not_answered_together(network, tokenizer):
    """One stream of greedy, drawn and scored-by-length requests gives each what it gets alone."""
    drawn = DecodingConfig(max_new_tokens=3, temperature=1.0)
    kinds = [
        Request([5, 6], GREEDY),
        Request([7, 8, 9], GREEDY),
        Request([7, 8, 9], drawn, seed=1),
        Request([7, 8, 9], drawn, seed=2),
        Request([5], GREEDY, StopRule([7], [])),
        Request([5], GREEDY, never=[9]),
    ]
    engine = TransformersEngine(network, tokenizer)
    together = engine.generate(kinds)
    for request, found in zip(kinds, together, strict=True):
        assert found[0].token_ids == engine.generate([request])[0][0].token_ids
    assert together[2][0].token_ids != together[3][0].token_ids
    assert network.training  # as it was


def test_log_probabilities_are_those_of_each_generated_token(network, tokenizer):
    """Also of tokens before a stop string, which other rows of the batch do not end with."""
    engine = TransformersEngine(network, tokenizer)
    plain = engine.generate([Request(PROMPTS[0], GREEDY)])[0][0]
    stop = StopRule([], [tokenizer.decode(plain.token_ids[1:2])])
    found = engine.generate([Request(prompt, GREEDY, stop) for prompt in PROMPTS])
    assert found[0][0].finish_reason == "stop" and found[0][0].num_tokens < plain.num_tokens
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logps = network.eval()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        expected = [float(logps[len(prompt) + n - 1, token]) for n, token in enumerate(completion.token_ids)]
        assert completion.logps == pytest.approx(expected, abs=1e-5)
        assert completion.logp == pytest.approx(sum(expected), abs=1e-5)


def test_scores_are_raw_and_those_of_each_prompt_alone():
    module = reward_model()
    network = module.load_model().eval()
    found = TransformersEngine(network, module.tokenizer, batch_size=3).generate([Request(ids) for ids in PROMPTS])
    for ids, score in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = scores_at(network, torch.tensor([len(ids) - 1]), input_ids=torch.tensor([ids]))[0]
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-6)


def test_files_of_images_are_not_for_the_transformers_engine(network, tokenizer):
    request = Request([5], GREEDY, images=Images(["a.png"], 9, 4))
    with pytest.raises(TypeError, match="takes embeddings of images, not their files"):
        TransformersEngine(network, tokenizer).generate([request])


def test_line_of_a_completion_leaves_out_what_was_not_asked():
    line = {"id": "1", "content": "yes", "finish_reason": "stop", "num_tokens": 2}
    assert Completion([3, 4], None, "yes", "stop").prediction(1) == line
    assert Completion([3, 4], [-0.5, -0.25], "yes", "stop").prediction(1) == line | {"logprob": -0.75}
    assert Completion([3, 4], None, "yes", "stop", marginal_logp=-2.0).prediction(1) == line | {"logprob": -2.0}


def test_seed_depends_on_settings_step_and_prompt():
    assert step_seed(7, 0) == 7
    seeds = [step_seed(seed, step) for seed in (0, 1) for step in (1, 2, 11)]
    assert len(set(seeds)) == 6 and seeds == [step_seed(seed, step) for seed in (0, 1) for step in (1, 2, 11)]
    assert prompt_seed(1, [[5, 6]]) == prompt_seed(1, [[5, 6]]) != prompt_seed(2, [[5, 6]])
    assert prompt_seed(1, [[5, 6]]) != prompt_seed(1, [[5], [6]])
    assert all(0 <= seed < 2**63 for seed in [*seeds, prompt_seed(1, [[5]])])


def test_sampled_tables_differ_between_steps_and_repeat_between_runs(tmp_path):
    """The learning rate is too small to change an answer: what differs is the draw."""
    drawn = DecodingConfig(max_new_tokens=6, temperature=1.0)

    def tables(folder):
        module = sft_module()
        module.optimizer_config = module.optimizer_config.__class__(learning_rate=1e-12)
        picks = CherryPicks(generation=drawn, num_samples=2)
        runner = trainer(folder, callbacks=[picks], max_steps=2, max_epochs=2, val_check_interval=1)
        runner.fit(module, sft_data(module, chats(1), chats(2)))
        return [pick.answers for pick in picks.picks]

    first = tables(tmp_path / "a")
    assert all(answers.keys() == {0, 1, 2} and len(set(answers.values())) == 3 for answers in first)
    assert tables(tmp_path / "b") == first
