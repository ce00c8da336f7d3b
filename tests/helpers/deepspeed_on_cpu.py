"""Lightning's DeepSpeed strategy on CPUs, which it refuses by itself; for tests alone."""

from unittest.mock import patch

import lightning.pytorch.strategies.deepspeed as lightning_deepspeed
import torch

from lit_alignment.distributed.deepspeed import DeepSpeedStrategy


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """ZeRO on gloo ranks."""

    def __init__(self, stage: int) -> None:
        super().__init__(stage=stage, zero_allow_untested_optimizer=True, process_group_backend="gloo")
        self.config["zero_force_ds_cpu_optimizer"] = False
        # By default tensors of the size of ours stay whole in stage 3, or until a last use that takes long to find.
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self.config["zero_optimization"]["stage3_max_reuse_distance"] = 0

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        with (
            patch.object(lightning_deepspeed, "_validate_device_index_selection"),
            # gloo sums without a kernel for shared memory, which takes minutes to compile.
            patch("deepspeed.comm.torch.build_shm_op", return_value=None),
        ):
            self.setup_distributed()
