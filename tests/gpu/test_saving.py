"""The copy that is written while training goes on."""

import torch

from lit_alignment.checkpoints.background import snapshot
from tests.helpers.devices import BOTH


@BOTH
def test_copy_of_a_checkpoint_is_on_the_host_and_stays_as_it_was(accelerator):
    device = "cuda" if accelerator == "gpu" else "cpu"
    weight = torch.arange(8.0, device=device)
    copy = snapshot({"state_dict": {"a": weight, "tied": weight}, "step": 3})
    weight.zero_()
    first, second = copy["state_dict"].values()
    assert first.device.type == "cpu" and torch.equal(first, torch.arange(8.0)) and copy["step"] == 3
    assert first is second
