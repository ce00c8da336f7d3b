"""What a written folder holds."""

import torch
from transformers import AutoModelForCausalLM

from lit_alignment.checkpoints.hf_folder import Companions, write_folder
from tests.helpers import sft_module, weights


def test_full_export_holds_the_given_weights_and_leaves_the_live_ones(tmp_path):
    module = sft_module()
    network = module.load_model()
    live = weights(network)
    given = {name: value + 1 for name, value in live.items()}
    folder = write_folder(network, given, tmp_path / "out", Companions(module.tokenizer, None), "full")
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, value in given.items():
        assert torch.equal(written[name], value), name
        assert torch.equal(network.get_parameter(name), live[name]), name
