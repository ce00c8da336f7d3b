"""Lets a torchvision that was built for CUDA be imported beside a torch for CPU.

Its compiled operators cannot be loaded there, and it registers kernels of one of them while it is imported. The
operator's schema is declared just before that. This file is copied beside torchvision, and imported when Python starts,
so it imports nothing itself.
"""

import sys
from typing import Any


class DeclareOperators:
    """Stands before Python's own finders, until torchvision is asked for."""

    declared: Any = None  # the schemas are gone when it is

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Declare the schemas, and leave the finding to others."""
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch
        from torch import library as operators

        DeclareOperators.declared = operators.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                DeclareOperators.declared.define(schema)


sys.meta_path.insert(0, DeclareOperators())
