"""Responses that share a prompt in a row train as if each had its own."""

import pytest
import torch

from lit_alignment.models.loading import BackboneConfig
from tests.helpers import pairs, reward_data, reward_model, step_gradients
from tests.helpers.devices import BOTH

LAYOUTS = {"shared": {}, "apart": {"share_prompts": False}, "padded": {"packing": False}}


@BOTH
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_gradients_do_not_depend_on_how_prompts_are_laid_out(dtype, allowed, accelerator, base, tmp_path):
    found = {}
    for name, layout in LAYOUTS.items():
        model = reward_model(base, lora=True, backbone=BackboneConfig(base, dtype=dtype))
        data = reward_data(model, pairs(6), batch_size=6, tokens_per_batch=4096, **layout)
        gradients = step_gradients(tmp_path, model, data, accelerator=accelerator, devices=1)
        found[name] = torch.cat([gradients[key].float().flatten() for key in sorted(gradients)])
    for name in ("shared", "apart"):
        assert float((found[name] - found["padded"]).norm() / found["padded"].norm()) < allowed
