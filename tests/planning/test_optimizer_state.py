"""States of optimizers in bytes, of matrices too large to try, against what they are by their definitions."""

import pytest
import torch
from torch import nn

from lit_alignment import MuonWithAdamW, ScheduleFreeAdamW
from lit_alignment.errors import ConfigError
from lit_alignment.models.roles import roles_of
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.planning.optimizer_state import state_bytes
from tests.helpers import sft_module

ROWS, COLUMNS = 3000, 520
BYTES = {
    None: 8 * (ROWS * COLUMNS + ROWS),
    torch.optim.SGD: 0,
    torch.optim.Adafactor: 4 * (ROWS + COLUMNS + ROWS),  # rows and columns of the matrix, the whole vector
    ScheduleFreeAdamW: 8 * (ROWS * COLUMNS + ROWS),
}


@pytest.mark.parametrize("algorithm", BYTES)
def test_states_are_counted_as_they_are(algorithm):
    network = nn.Linear(COLUMNS, ROWS, device="meta")
    config = OptimizerConfig(algorithm=algorithm, schedule="constant")
    assert state_bytes(network, config) == BYTES[algorithm]
    network.weight.requires_grad_(False)
    assert state_bytes(network, OptimizerConfig()) == 8 * ROWS


def test_muon_keeps_one_number_for_each_weight_of_a_hidden_matrix_and_two_for_others():
    network = sft_module().load_model()
    hidden = roles_of(network).hidden
    expected = sum(p.numel() * (4 if id(p) in hidden else 8) for p in network.parameters())
    assert state_bytes(network, OptimizerConfig(algorithm=MuonWithAdamW)) == expected


def test_eight_bits_are_a_byte_and_the_scales_of_blocks():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    network = nn.Linear(1024, 4096, bias=False, device="meta")
    found = state_bytes(network, OptimizerConfig(algorithm=bitsandbytes.optim.AdamW8bit))
    assert found == pytest.approx(2 * 1024 * 4096 * (1 + 4 / 256), rel=1e-3)


class Kernels(torch.optim.SGD):
    def step(self, closure=None):
        raise NotImplementedError("no kernel for 'cpu'")


def test_algorithm_that_makes_no_step_here_is_said():
    with pytest.raises(ConfigError, match=r"Kernels makes no step on a CPU \(no kernel for 'cpu'\), so its states"):
        state_bytes(nn.Linear(2, 2), OptimizerConfig(algorithm=Kernels))
