"""A function call as a module computes what the call computed, and is named after its function."""

from __future__ import annotations

import functools

import torch
from fxcompile.passes._call import Call
from torch import fx


def test_it_gives_the_function_all_its_arguments() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(Call(torch.permute, (0, 2, 1))(x), x.permute(0, 2, 1))
    assert torch.equal(Call(torch.mean, dim=1, keepdim=True)(x), x.mean(1, keepdim=True))


def test_of_a_node_it_takes_all_but_the_input() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.mean, (graph.placeholder("x"), 1), {"keepdim": True})
    call = Call.of(node)
    assert (call.function, call.args, call.kwargs) == (torch.mean, (1,), {"keepdim": True})


def test_it_is_printed_under_the_name_of_its_function() -> None:
    assert repr(Call(torch.permute, (0, 2, 1))) == "permute()"
    assert repr(Call(functools.partial(torch.flatten, start_dim=1))).startswith("functools.partial(<built-in")
