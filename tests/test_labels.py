"""Nodes and layers have one name and one description, wherever they are shown."""

from __future__ import annotations

import pytest
import torch
from helpers import Net
from torch import nn

from fxcompile.labels import describe_layer, describe_node, node_name
from fxcompile.tracing import trace


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(32, 64, 5, stride=2), "Conv2d 32->64 5x5 /2"),
        (nn.Conv2d(8, 8, (1, 3), stride=(1, 2), groups=8), "Conv2d 8->8 1x3 /1x2 groups=8"),
        (nn.ConvTranspose1d(4, 2, 3), "ConvTranspose1d 4->2 3"),
        (nn.Linear(10, 3), "Linear 10->3"),
        (nn.ReLU(), "ReLU"),
        (nn.MaxPool2d(2), "MaxPool2d"),
    ],
)
def test_a_layer_is_described_in_a_few_characters(layer: nn.Module, text: str) -> None:
    assert describe_layer(layer) == text


def test_nodes_go_by_the_layer_or_the_function_that_they_call() -> None:
    net = Net(lambda self, x: torch.cat([self.stem(x), x], 1), stem=nn.Conv2d(3, 3, 1)).eval()
    program = trace(net, torch.randn(1, 3, 4, 4))
    shown = [(node_name(node), describe_node(program, node)) for node in program.graph.nodes if node.op[:4] == "call"]
    assert shown == [("stem", "Conv2d 3->3 1x1"), ("cat", "cat")]
