"""What FSDP2 shards by itself."""

import pytest
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM

from lit_alignment.distributed.sharding import shard_layers
from tests.helpers import DECODER_SIZE


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "place"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_each_decoder_layer_is_sharded_wherever_an_architecture_keeps_it(mesh, name, place):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(DECODER_SIZE | {"num_hidden_layers": 3})))
    shard_layers(model, {"mesh": mesh})
    sharded = [part for part, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert sharded == ["", *(f"{place}.{number}" for number in range(3))]
