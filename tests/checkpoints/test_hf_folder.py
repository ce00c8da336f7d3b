"""What a written folder holds."""

import resource
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_alignment.checkpoints.hf_folder import Companions, write_folder
from lit_alignment.errors import CheckpointError
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


def test_full_disk_is_one_message_and_leaves_the_earlier_folder(tmp_path):
    module = sft_module()
    network = module.load_model()
    companions = Companions(module.tokenizer, None)
    folder = write_folder(network, {}, tmp_path / "out", companions, "full")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot write the export \(.*too large"):
            write_folder(network, {}, folder, companions, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]
