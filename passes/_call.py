"""A function call as a module, so that a replacement can hold operations for which torch.nn has no layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Call(nn.Module):
    """`function(x, *args, **kwargs)`"""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.args, **self.kwargs)
