"""The reference beside a policy with adapters is the model before training, whatever the adapters are."""

import pytest
import torch
from lightning.pytorch import Callback
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig

from lit_alignment import AdapterConfig
from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import save_adapter
from lit_alignment.models.reference import quiet_logps
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from tests.helpers import base_model_folder, pairs, preference_data, preference_module, trainer

KIND = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, **KIND),
    "rank-stabilised, with dropout": LoraConfig(
        r=4, target_modules="all-linear", use_rslora=True, lora_dropout=0.5, **KIND
    ),
    "a head of its own": LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], **KIND),
    "on the head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **KIND),
    "rows of tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[100, 101, 102], **KIND),
    "rows of new tokens": LoraConfig(r=4, target_modules="all-linear", **KIND),
    "norms": LNTuningConfig(target_modules=["norm"], **KIND),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **KIND),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, **KIND),
}


class Watched(Callback):
    """Log-probabilities of the validation's targets under policy and reference when training begins."""

    @staticmethod
    def logps(module):
        (batch,) = module.trainer.datamodule.val_dataloader()
        return quiet_logps(module.network, batch), module.judged_logps(batch)

    def on_train_start(self, trainer, pl_module):
        self.policy, self.reference = self.logps(pl_module)


def run_with(folder, base, name, **settings):
    """A module that was trained, and what was watched."""
    if name == "rows of new tokens":
        settings["tokens"] = TokensConfig(new={"<x>": NewTokenConfig(), "yes": NewTokenConfig()})
    shape = {"packing": False, "batch_size": 6} if name == "prefix" else {"tokens_per_batch": 8192}
    module = preference_module(base, **settings)
    watched = Watched()
    run = trainer(folder, callbacks=[watched], max_epochs=3)
    run.fit(module, preference_data(module, pairs(6), pairs(4, 1), **shape))
    return module, watched


@pytest.mark.parametrize("name", ADAPTERS)
def test_without_its_new_adapters_the_policy_is_the_base(tmp_path, name):
    base = base_model_folder(tmp_path / "base")
    module, watched = run_with(tmp_path, base, name, peft=ADAPTERS[name])
    policy, reference = Watched.logps(module)
    assert module.reference == "adapter_off" and torch.equal(reference, watched.reference)
    if name != "prefix":  # virtual tokens begin at random
        assert torch.equal(reference, watched.policy)
    if name != "rows of new tokens":
        whole, of_base = run_with(tmp_path, base, name, reference="frozen_copy")
        torch.testing.assert_close(of_base.reference, reference, rtol=0, atol=1e-5)
        assert whole.reference == "frozen_copy"
    assert float((policy - reference).abs().max()) > 1e-3
    assert any(parameter.requires_grad for parameter in module.parameters())


def test_biases_that_train_with_adapters_are_not_in_the_reference(tmp_path):
    """They stay when the adapters are switched off, so that the model before training is kept otherwise."""
    base = base_model_folder(tmp_path / "base", attention_bias=True)
    peft = LoraConfig(r=4, target_modules="all-linear", bias="all", **KIND)
    found = {}
    for reference in ("auto", "frozen_copy"):
        module, watched = run_with(tmp_path, base, reference, peft=peft, reference=reference)
        assert module.reference == ("cached" if reference == "auto" else "frozen_copy")
        (batch,) = module.trainer.datamodule.val_dataloader()
        found[reference] = module.judged_logps(batch)
        torch.testing.assert_close(found[reference], watched.policy, rtol=0, atol=1e-5)
        assert float((Watched.logps(module)[0] - watched.policy).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="bias: none"):
        preference_module(base, peft=peft, reference="adapter_off")


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "prefix"])
def test_beside_a_continued_adapter_stands_the_same_one_as_it_was(tmp_path, name):
    base = base_model_folder(tmp_path / "base")
    module, _ = run_with(tmp_path, base, name, peft=ADAPTERS[name])
    save_adapter(module.network, tmp_path / "adapter")
    trained, _ = Watched.logps(module)
    module, watched = run_with(tmp_path, base, name, adapter=AdapterConfig(str(tmp_path / "adapter"), trainable=True))
    policy, reference = Watched.logps(module)
    assert module.reference == "frozen_copy" and module.reference_model is None
    assert torch.equal(reference, watched.reference) and torch.equal(reference, watched.policy)
    torch.testing.assert_close(reference, trained, rtol=0, atol=1e-5)
    assert float((policy - reference).abs().max()) > 1e-3
