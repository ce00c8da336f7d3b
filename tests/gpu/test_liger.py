"""Liger's kernels: the numbers of the model without them, and of no other model's doing."""

import pytest
import torch
from lightning.pytorch import seed_everything
from peft import AutoPeftModelForCausalLM

from lit_alignment import Export, SFTModule
from lit_alignment.models.loading import BackboneConfig
from tests.helpers.devices import GPU, LORA, fit

pytestmark = GPU


def module_with(base, **settings):
    seed_everything(0, verbose=False)
    return SFTModule(BackboneConfig(base, dtype="float32", **settings), LORA)


def test_logits_and_gradients_are_those_without_liger(base):
    pytest.importorskip("liger_kernel")
    ids, found = torch.arange(3, 40, device="cuda")[None], []
    for liger in (False, True):
        network = module_with(base, liger=liger).load_model("cuda").cuda()
        logits = network(input_ids=ids).logits
        logits.logsumexp(-1).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found.append((logits.detach(), gradients))
    (plain, gradients), (fused, gradients_of_fused) = found
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)
    assert float((gradients_of_fused - gradients).norm() / gradients.norm()) < 1e-2


def test_run_with_liger_exports_and_its_folder_loads_on_a_cpu_in_the_same_process(base, tmp_path):
    pytest.importorskip("liger_kernel")
    module = module_with(base, liger=True)
    fit(tmp_path, module, accelerator="gpu", callbacks=[Export()])
    ids = torch.arange(3, 40)[None]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved/export").eval()
    with torch.no_grad():
        expected = module.network.cuda().eval()(input_ids=ids.cuda()).logits.cpu()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-2, atol=1e-2)
