"""Policy optimisation whose responses vLLM samples."""

import pytest
from lightning.pytorch import Callback
from peft import LoraConfig

from lit_alignment import DecodingConfig, PolicyLossConfig, RolloutConfig
from lit_alignment.rollout.samplers import SampledPolicy, TransformersSampler
from lit_alignment.vllm.sampler import VLLMSampler
from tests.helpers import chats, policy_data, policy_module, trainer
from tests.helpers.samplers import requests
from tests.vllm.helpers import SMALL

GREEDY = DecodingConfig(max_new_tokens=12)


class BothEngines(Callback):
    """What both engines answer after each step."""

    def __init__(self):
        self.answers = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        reference = TransformersSampler()
        reference.start(SampledPolicy(pl_module.network, pl_module.tokenizer, pl_module.backbone))
        pl_module.sampler.sync(trainer.global_step)
        asked = requests(GREEDY, [10 * number for number in range(1, 17)])
        found = [each.sample(asked, wanted_logps=False) for each in (pl_module.sampler, reference)]
        self.answers.append([[completion.token_ids for (completion,) in engine] for engine in found])


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_samples_from_the_policy_of_each_step(tmp_path, base):
    """O3: after each of three trained steps both engines give the same greedy tokens; the policy has moved."""
    both = BothEngines()
    module = policy_module(
        base,
        peft=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
        rollout=RolloutConfig(num_responses=4, max_new_tokens=8, temperature=0.7),
        loss=PolicyLossConfig(correction="token_truncate", kl_weight=0.01),
        engine=VLLMSampler(SMALL),
    )
    run = trainer(tmp_path, max_steps=3, log_every_n_steps=1, callbacks=[both])
    run.fit(module, policy_data(module, chats(6), batch_size=2))
    assert len(both.answers) == 3
    for vllm, transformers in both.answers:
        assert vllm == transformers
    assert both.answers[0][0] != both.answers[2][0]
    assert float(run.callback_metrics["train/ratio"]) == 1.0
