"""Adapters over weights in 4 and 8 bits: gradients, precisions, resume, export and merge."""

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_alignment import Export, SFTModule
from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import why_merge
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.tools import merge
from tests.helpers import weights
from tests.helpers.devices import BOTH, LORA, fit

KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("bitsandbytes")


def module_with(base, **settings):
    seed_everything(0, verbose=False)
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
    return SFTModule(BackboneConfig(base, **settings), LORA, optimizer=optimizer)


def quantised_layers(network):
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}


def gradients(network):
    ids = torch.arange(3, 60, device=next(network.parameters()).device)[None]
    network.train()
    network(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.float().flatten() for p in network.parameters() if p.requires_grad])


@BOTH
@KINDS
def test_gradients_are_those_of_the_dequantised_weights(kind, accelerator, base):
    """Also after a pass without gradients, for which bitsandbytes would change the weights of a CPU."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    device = "cuda" if accelerator == "gpu" else "cpu"
    networks = []
    for quantization in (kind, "none"):
        network = module_with(base, quantization=quantization).load_model(device).to(device)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(device)
        networks.append(network)
    quantised, plain = networks
    for name, layer in quantised_layers(quantised).items():
        own = plain.get_submodule(name).weight
        own.data = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(own.dtype)
    with torch.no_grad():
        quantised.eval()(input_ids=torch.arange(3, 60, device=device)[None])
    found, expected = gradients(quantised), gradients(plain)
    assert float((found - expected).norm() / expected.norm()) < 0.15  # on a GPU int8 rounds hidden states as well


@BOTH
@KINDS
def test_adapters_over_quantised_weights_train_resume_and_export(kind, accelerator, base, tmp_path):
    module = module_with(base, quantization=kind)
    export = Export()
    whole, runner = fit(tmp_path, module, accelerator=accelerator, callbacks=[export])
    frozen = {layer.weight.dtype for layer in quantised_layers(module.network).values()}
    assert frozen == {torch.uint8 if kind == "nf4" else torch.int8}
    assert {p.dtype for p in module.network.parameters() if p.requires_grad} == {torch.float32}
    inner = base_model(module.network)
    usual = torch.bfloat16 if accelerator == "gpu" else torch.float32
    assert inner.model.norm.weight.dtype == inner.lm_head.weight.dtype == usual

    again, _ = fit(tmp_path / "again", module_with(base, quantization=kind), tmp_path / "saved/step=3.ckpt",
                   accelerator=accelerator)  # fmt: skip
    assert again.ids == whole.ids[3:] and again.losses == pytest.approx(whole.losses[3:], rel=1e-3)

    assert why_merge(module.network) == ""
    written = load_file(tmp_path / "saved/export/adapter_model.safetensors")
    live = {name.removeprefix("model.").replace(".default", ""): p.cpu() for name, p in weights(module).items()}
    assert written.keys() == live.keys() and all(torch.equal(value, live[name]) for name, value in written.items())

    last = str(tmp_path / "saved/step=4.ckpt")
    with pytest.raises(ConfigError, match="--form adapter, or accept that: --dequantize"):
        merge.main([last, "--out", str(tmp_path / "merged")])
    merge.main([last, "--out", str(tmp_path / "merged"), "--dequantize"])
    names = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().keys()
    assert names == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
