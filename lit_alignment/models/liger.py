"""Liger's fused kernels in one model, and in no other of the process."""

import sys
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_alignment.errors import ConfigError


def apply_liger(model: PreTrainedModel) -> None:
    """Put Liger's kernels into a loaded model; the loss is not taken from it.

    Liger also puts its layers, and its rotary positions, in place of those of the architecture's Python module, so that
    a model which is loaded later, to compare an export on the CPU for one, would have kernels that no CPU runs. The
    layers are put back, and the function is Liger's for tensors on a GPU alone.

    Raises:
        ConfigError: If Liger has no kernels for the architecture, or not under this head.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    name = model.config.model_type
    if name not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"backbone.liger: Liger has no kernels for {name}. Set it to false.")
    architecture = vars(sys.modules[type(model).__module__])
    before = dict(architecture)
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    except (TypeError, ValueError, AttributeError) as error:  # of architectures whose classes it looks at one by one
        raise ConfigError(
            f"backbone.liger: Liger cannot change a {type(model).__name__} ({error}). Set it to false."
        ) from error
    finally:
        changed = {key: architecture[key] for key, plain in before.items() if architecture[key] is not plain}
        for key, fused in changed.items():
            plain = before[key]
            architecture[key] = _by_device(fused, plain) if isinstance(plain, FunctionType) else plain
    if not changed:
        raise ConfigError(f"backbone.liger: Liger has no kernels for {name} but its loss. Set it to false.")


def _by_device(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors that is one on a GPU and another elsewhere."""

    @wraps(plain)
    def either(*args: Any, **kwargs: Any) -> Any:
        given = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        return (plain if given.device.type == "cpu" else fused)(*args, **kwargs)

    return either
