"""What in a training step would make the CPU wait for a GPU, seen without one."""

from collections import Counter
from traceback import extract_stack

import torch
from lightning.pytorch import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OURS = ("/lit_alignment/", "/transformers/")
APART = ("/generation/", "/rollout/")  # the step's texts follow from what these read
READS = ("local_scalar_dense", "equal", "is_nonzero", "masked_select", "masked_scatter_backward", "nonzero")
READS += ("unique", "unique2", "unique_dim")


class Waits(TorchDispatchMode, Callback):
    """Counts operations that read a value, or whose shape depends on values, by place, from the second step on.

    Lightning's own are left out: they are scalars that nobody of ours reads.

    Attributes:
        places: How often, by operation and place.
        micro_batches: In how many.
        batch: The last of these.
    """

    def __init__(self):
        super().__init__()
        self.places, self.micro_batches, self.batch = Counter(), 0, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:  # the first step may look at things once
            self.__enter__()
        else:
            self.micro_batches, self.batch = self.micro_batches + 1, batch

    def on_train_end(self, trainer, pl_module):
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        masks = name in ("index", "index_put") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if masks or name in READS:
            frames = [frame for frame in extract_stack() if any(part in frame.filename for part in OURS)]
            apart = any(part in frame.filename for frame in frames for part in APART)
            if not apart and (frames or name != "local_scalar_dense"):  # without frames: the backward pass
                self.places[f"{name}: {frames[-1].filename}:{frames[-1].lineno}" if frames else name] += 1
        return func(*args, **(kwargs or {}))


class NothingFromTheHost(TorchFunctionMode):
    """Refuses tensors on the device that are made of the host's values: their copy waits until all queued work is done.

    Copies that do not block are fine: those of a batch.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        moved = func is torch.Tensor.to and args[0].device != found.device and not kwargs.get("non_blocking")
        listed = func is torch.Tensor.__getitem__ and isinstance(args[1], list)
        on_device = isinstance(found, torch.Tensor) and found.device.type == "meta"
        assert not (on_device and (made or moved or listed)), f"{func.__name__} copies from the host"
        return found
