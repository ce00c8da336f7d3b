"""vLLM on a GPU: its answers, and the adapter that it samples from after each sync."""

import pytest
import torch
from lightning.pytorch import seed_everything

from lit_alignment import SFTModule
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.rollout.samplers import SampledPolicy
from tests.helpers import chats, sft_data
from tests.helpers.devices import GPU
from tests.helpers.samplers import lora, move, requests, sampled_logps, trainer_logps
from tests.vllm.helpers import by_vllm, lines

pytestmark = GPU
SETTINGS = {"max_model_len": 512, "max_num_seqs": 8, "gpu_memory_utilization": 0.2, "enforce_eager": True}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_predict_answers_every_record(base, tmp_path):
    pytest.importorskip("vllm")
    seed_everything(0, verbose=False)
    greedy = DecodingConfig(max_new_tokens=8)
    module = SFTModule(BackboneConfig(base), generation={"greedy": greedy})
    folder = by_vllm(tmp_path, module, sft_data(module, chats(2), chats(5)), **SETTINGS)
    assert [line["id"] for line in lines(folder, "greedy")] == [each["id"] for each in chats(5)]


def test_samples_after_each_sync_are_from_the_adapter_as_it_is(base):
    pytest.importorskip("vllm")
    from lit_alignment.vllm.sampler import VLLMSampler

    module = SFTModule(BackboneConfig(base, dtype="bfloat16"), lora())
    network = module.load_model("cuda").cuda().train()
    sampler = VLLMSampler(SETTINGS)
    sampler.start(SampledPolicy(network, module.tokenizer, module.backbone))
    asked = requests(DecodingConfig(max_new_tokens=16, temperature=0.7), [5, 20, 60])
    try:
        for step in range(2):
            moved = network.cpu()
            move(moved, seed=step, size=0.1)
            network.cuda()
            sampler.sync(step)
            responses = sampler.sample(asked)
            expected = trainer_logps(network, asked, responses, 0.7).cpu()
            assert float((sampled_logps(responses) - expected).abs().mean()) < 0.05
    finally:
        sampler.close()
    assert torch.isfinite(expected).all()
