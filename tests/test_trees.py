"""Where layers lie in the module tree: none inside of another, whatever the model's own tree is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompile.tracing import trace
from fxcompile.trees import is_free, is_layer, outside_of_layers, place


class NormAct(nn.BatchNorm2d):
    """A norm that holds the activation after it, as timm writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU()
        self.pool = nn.Sequential(nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)
        return self.pool(self.act(self.drop(x)))


class ActConv(nn.Conv2d):
    """A convolution that holds the activation ahead of it."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.act(x), self.weight, self.bias)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ActConv()
        self.norm = NormAct(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("road", ["symbolic", "exported"])
def test_what_a_layer_holds_is_put_beside_it(road: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Cell(), Cell()).eval(), torch.randn(2, 4, 16, 16)
    program = trace(model if road == "symbolic" else torch.export.export(model, (x,)), (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    own = ["conv_act", "conv", "norm", "norm_act", "norm_pool_0"]
    assert called == [f"{cell}.{name}" for cell in (0, 1) for name in own]
    for name in called:
        assert not any(True for _ in program.module.get_submodule(name).children())
    assert torch.allclose(program(x), model(x), atol=1e-6)


def test_a_path_inside_of_a_layer_is_not_free() -> None:
    root = nn.Module()
    place(root, "stem.conv", nn.Conv2d(1, 1, 1))
    place(root, "stem.scale", torch.ones(1))
    assert is_layer(root, "stem.conv")
    assert not is_layer(root, "stem")
    assert not is_layer(root, "stem.other")
    assert [is_free(root, path) for path in ("stem", "stem.conv", "stem.conv.act", "stem.scale")] == [False] * 4
    assert is_free(root, "stem.conv_act")
    assert is_free(root, "head.conv")


def test_a_path_inside_of_a_layer_is_put_beside_it() -> None:
    root = nn.Module()
    place(root, "a.b", nn.ReLU())
    assert outside_of_layers(root, "a.b.c.d") == "a.b_c_d"
    assert outside_of_layers(root, "a.b") == "a.b"
    assert outside_of_layers(root, "a.c") == "a.c"
    assert outside_of_layers(root, "a.c.d", {"a.c"}) == "a.c_d"
