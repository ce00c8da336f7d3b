"""Every kind of adapter over a tiny base model, and its short training."""

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from lit_alignment import SFTModule
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, sft_data, trainer

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
WEIGHTS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "pissa_niter": LoraConfig(**LORA, init_lora_weights="pissa_niter_4"),
}
PROMPTS = {
    "prefix": PrefixTuningConfig(**VIRTUAL),
    "prefix_projection": PrefixTuningConfig(**VIRTUAL, prefix_projection=True, encoder_hidden_size=16),
    "prompt": PromptTuningConfig(**VIRTUAL),
    "p_tuning": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=16),
}
ADAPTERS = WEIGHTS | PROMPTS


def module_with(base, peft=None, **settings):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    return SFTModule(BackboneConfig(base), peft, optimizer=optimizer, **settings)


def fit(folder, module, epochs=2, resume=None, callbacks=(), **data):
    saver = ModelCheckpoint(folder / "ckpt", save_last=True)
    runner = trainer(folder, callbacks=[*callbacks, saver], enable_checkpointing=True, max_epochs=epochs)
    seed_everything(0, verbose=False)  # the adapters' own start
    data.setdefault("packing", module.peft_config is None or not module.peft_config.is_prompt_learning)
    runner.fit(module, sft_data(module, chats(8), chats(4), batch_size=4, **data), ckpt_path=resume)
    return saver.last_model_path


@torch.no_grad()
def logits(model):
    model.eval()
    ids = torch.arange(3, 40)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
