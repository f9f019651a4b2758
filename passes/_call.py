"""A function call as a module, so that a replacement can hold operations for which torch.nn has no layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn


class Call(nn.Module):
    """`function(x, *args, **kwargs)`"""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function = function
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def of(cls, node: fx.Node) -> Call:
        """The call of a function node whose only input is its first argument."""
        assert callable(node.target)
        return cls(node.target, *node.args[1:], **node.kwargs)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.args, **self.kwargs)

    def _get_name(self) -> str:
        return str(getattr(self.function, "__name__", self.function))
