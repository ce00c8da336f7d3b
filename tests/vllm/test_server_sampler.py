"""Rollouts by a server: vLLM's own with the policy's adapter, and what is said where it cannot be had."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from lit_alignment.errors import ConfigError, TrainingError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.rollout.samplers import TransformersSampler
from lit_alignment.vllm.server_sampler import ServerSampler, completion_body
from tests.helpers.samplers import lora, move, policy, requests, sampled_logps, trainer_logps
from tests.vllm.helpers import serving

GREEDY = DecodingConfig(max_new_tokens=16)
DRAWN = DecodingConfig(max_new_tokens=16, temperature=0.7, num_return_sequences=2)
LENGTHS = [5, 60, 128, 150, 200, 300]


@pytest.mark.vllm
@pytest.mark.slow
def test_server_samples_from_the_adapter_of_each_sync(base, tmp_path):
    """O1 and O3; an adapter that the server has no room for is refused with its reason."""
    found, reference = policy(base, lora()), TransformersSampler()
    reference.start(found)
    options = ("--enable-lora", "--max-lora-rank", "8", "--logprobs-mode", "processed_logprobs")
    with serving(base, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as address:
        sampler = ServerSampler(f"{address}/", str(tmp_path / "adapters"), tolerance=1e-3)
        sampler.start(found)
        for step in range(2):
            move(found.network, seed=step, size=0.1)
            sampler.sync(step)
            asked = requests(GREEDY, LENGTHS)
            tokens, expected = (
                [completion.token_ids for (completion,) in each.sample(asked)] for each in (sampler, reference)
            )
            assert tokens == expected
        asked = requests(DRAWN, LENGTHS)
        responses = sampler.sample(asked)
        assert [len(group) for group in responses] == [2] * len(LENGTHS) and sampler.sample(asked) == responses
        expected = trainer_logps(found.network, asked, responses, 0.7)
        torch.testing.assert_close(sampled_logps(responses), expected, rtol=0, atol=1e-3)
        sampler.check([each for group in responses for each in group], expected)
        with pytest.raises(TrainingError, match=r"a prompt cannot be answered \(.*512"):
            sampler.sample(requests(GREEDY, [600]))
        assert len(list((tmp_path / "adapters").glob("*/*"))) == 1
        sampler.close()
        assert list((tmp_path / "adapters").iterdir()) == []
        large = ServerSampler(address, str(tmp_path / "adapters"))
        large.start(policy(base, lora(r=16)))
        with pytest.raises(TrainingError, match=r"does not load the adapter of step 7 .*rank.*--max-lora-rank"):
            large.sync(7)
        large.close()


@contextmanager
def answering(**statuses):
    """A server that has nothing but models, and its address; it answers other statuses where they are given."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(statuses.get("models", 200))

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(statuses.get(self.path.rsplit("/", 1)[1], 404))

        def answer(self, status):
            text = json.dumps({"data": []} if status == 200 else {"error": {"message": "no such thing"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_server_that_does_not_answer_is_named(base, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(TrainingError, match=rf"no answer from a server at {address} \(.*refused\)\. Start it"):
            ServerSampler(address, str(tmp_path)).start(policy(base, lora()))


def test_endpoint_that_is_off_is_named_with_the_variable_that_turns_it_on(base, tmp_path):
    with answering() as address:
        sampler = ServerSampler(address, str(tmp_path / "adapters"))
        sampler.start(policy(base, lora()))
        with pytest.raises(
            TrainingError, match="no /v1/load_lora_adapter. Start .* VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        ):
            sampler.sync(0)
        sampler.close()
    assert list((tmp_path / "adapters").iterdir()) == []


@pytest.mark.parametrize(
    ("statuses", "problem"),
    [
        ({"models": 401}, "wants another key. Set VLLM_API_KEY"),
        ({"models": 500}, r"/v1/models answers 500 \(no such thing\). Is it a vLLM server"),
        ({"load_lora_adapter": 500}, r"does not load the adapter of step 3 .*\(no such thing\)"),
        ({"load_lora_adapter": 200, "completions": 400}, r"a prompt cannot be answered \(no such thing\)"),
        ({"load_lora_adapter": 200, "completions": 500}, r"answers 500 \(no such thing\)"),
        ({"load_lora_adapter": 200, "completions": 200}, "gives no token ids with log-probabilities"),
    ],
)
def test_what_a_server_refuses_is_said_once(base, tmp_path, statuses, problem):
    with answering(**statuses) as address:
        sampler = ServerSampler(address, str(tmp_path))
        with pytest.raises(TrainingError, match=problem):
            sampler.start(policy(base, lora()))
            sampler.sync(3)
            sampler.sample(requests(GREEDY, [5, 6]))
        sampler.close()


def test_rank_zero_alone_writes_and_loads(base, tmp_path):
    """Another rank gets the name that rank 0 has loaded."""
    found = policy(base, lora(), on_rank_zero=lambda run: "policy-of-rank-0")
    with answering() as address:
        sampler = ServerSampler(address, str(tmp_path / "adapters"))
        sampler.start(found)
        sampler.sync(0)
    assert completion_body(requests(GREEDY, [5])[0], sampler._served)["model"] == "policy-of-rank-0"
    assert not (tmp_path / "adapters").exists()


def test_request_says_all_that_the_server_has_defaults_for():
    (request,) = requests(DecodingConfig(max_new_tokens=7, temperature=0.7, top_k=5, stop_strings=["#"]), [4], seed=3)
    body = completion_body(request, "policy")
    assert body.pop("prompt") == list(request.token_ids) and body.pop("seed") > 0
    assert body == {
        "model": "policy",
        "n": 1,
        "max_tokens": 7,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["#"],
        "stop_token_ids": [2],
        "ignore_eos": True,
        "skip_special_tokens": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_address_and_policy_are_checked_before_the_server_is_asked(base, tmp_path):
    with pytest.raises(ConfigError, match="url is 'localhost:8000'; give one that begins with http"):
        ServerSampler("localhost:8000", str(tmp_path))
    with pytest.raises(ConfigError, match="connections is 0"):
        ServerSampler("http://localhost:8000", str(tmp_path), connections=0)
    with pytest.raises(ConfigError, match="so it samples from adapters only"):
        ServerSampler("http://localhost:8000", str(tmp_path)).start(policy(base))
