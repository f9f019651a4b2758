"""The model is run as a user would, watched, and left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import Written
from torch import Tensor, nn

from fxcompile.reference import Reference, left_alone
from fxcompile.signature import Signature


class Messy(nn.Module):
    """Does to itself whatever a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.log, self.cache, self.kinds, self.count = [1], {"a": 1}, {"x"}, 0

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        self.cache.clear()
        self.kinds.add("y")
        self.count += 1
        self.new = self.conv(x)
        self.seen += 1
        self.conv.weight.data = self.conv.weight.data * 2
        self.conv.bias = None
        self.extra = nn.ReLU()
        self.register_buffer("made", torch.ones(1))
        self.bn.train()
        return self.bn(self.conv(x))


def state(model: nn.Module) -> dict[str, Any]:
    """All that a model holds, by value."""
    held: dict[str, Any] = {f"mode of {name}": module.training for name, module in model.named_modules()}
    held |= {name: (id(tensor), tensor.tolist()) for name, tensor in model.state_dict(keep_vars=True).items()}
    return held | {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")}


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_as_it_was_afterwards_even_if_it_fails(fails: bool) -> None:
    model = Messy().train()
    model.bn.eval()
    before, order, seed = state(model), list(model.state_dict()), torch.get_rng_state()
    try:
        with left_alone(model):
            assert not any(module.training for module in model.modules())
            torch.rand(3)
            model(torch.randn(2, 3, 5, 5))
            model(torch.randn(2, 3, 5, 5))
            assert state(model) != before
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert state(model) == before
    assert list(model.state_dict()) == order
    assert torch.equal(torch.get_rng_state(), seed)
    assert not hasattr(model, "made")
    assert [name for name, _ in model.named_children()] == ["conv", "bn"]


def reference(forward: Callable[..., Any], *inputs: Tensor, **attributes: Any) -> Reference:
    class Called(Written):
        def forward(self, *inputs: Tensor) -> Any:  # type: ignore[override]
            return self.function(self, *inputs)

    model = Called(forward, conv=nn.Conv2d(3, 4, 3), **attributes).eval()
    return Reference(model, Signature.of(model, inputs, {}))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_other_inputs_are_of_the_same_kind_and_range() -> None:
    codes = torch.tensor([[3, 5, 4], [4, 4, 5]], dtype=torch.int16)
    inputs = (image() * 10 + 50, codes, torch.tensor([True, False]), torch.rand(7, 2).half(), torch.tensor(2.0))
    held = reference(lambda m, x, *others: m.conv(x), *inputs)
    assert held.batch_inputs() == [0, 1, 2]
    same, larger = held.other(0, seed=1), held.other(3, seed=1)
    assert [tensor.shape for tensor in same] == [tensor.shape for tensor in inputs]
    assert [tuple(tensor.shape) for tensor in larger] == [(5, 3, 5, 5), (5, 3), (5,), (7, 2), ()]
    for drawn in (same, larger):
        assert [tensor.dtype for tensor in drawn] == [tensor.dtype for tensor in inputs]
        assert abs(float(drawn[0].mean()) - 50) < 5
        assert 5 < float(drawn[0].std()) < 15
        assert set(drawn[1].flatten().tolist()) <= {3, 4, 5}
    assert all(torch.equal(a, b) for a, b in zip(same, held.other(0, seed=1), strict=True))
    assert not torch.equal(same[0], held.other(0, seed=2)[0])


def test_the_model_gets_copies_of_its_inputs() -> None:
    x = image()
    held = reference(lambda m, x: m.conv(x.mul_(0)), x)
    held.run(held.examples)
    assert torch.equal(x, image())


def test_a_cache_that_settles_is_no_state() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.grid.copy_(torch.arange(5.0))
        return m.conv(x) + m.grid.mean()

    assert reference(forward, image(), grid=torch.zeros(5)).suspects["write"].startswith(__file__)


def test_suspects_are_the_first_lines_of_each_kind() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y = y + torch.rand(4, 1, 1) * torch.rand(1)
        float(y.mean())
        y.tolist()
        m.scale.mul_(1)
        m.last = y
        return y

    held = reference(forward, image(), scale=torch.ones(1))
    first = forward.__code__.co_firstlineno
    lines = {kind: int(place.removeprefix(f"{__file__}:")) - first for kind, place in held.suspects.items()}
    assert lines == {"random": 2, "value": 3, "write": 5}


def test_outputs_are_in_plain_containers_and_have_names() -> None:
    held = reference(lambda m, x: {"maps": (m.conv(x), [x]), "other": None}, image())
    assert held.output_names == ("maps_0", "maps_1_0")
    assert held.output["maps"][1][0].shape == (2, 3, 5, 5)
