"""Modules whose weights come from a file are built without random numbers, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxcompile.reading import read_model
from fxcompile.uninitialised import Uninitialised


class Plain(nn.Module):
    """What nearly all constructors do: layers, which draw their weights, and other numbers for some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        nn.init.kaiming_normal_(self.conv.weight)
        self.fc.weight.data.normal_(0, 0.01)
        self.fc.bias.data.zero_()
        nn.init.uniform_(self.norm.running_mean)
        self.token = nn.Parameter(torch.empty(1, 4))
        nn.init.xavier_uniform_(self.token)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3))) + self.token


class OwnBuffer(Plain):
    """Random numbers that are in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(4).normal_(), persistent=False)


class FilledBuffer(Plain):
    """The same, filled where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(4), persistent=False)
        self.codes.normal_()


class Derived(Plain):
    """A number made of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(self.conv.weight.abs().max())


class Copied(Plain):
    """A tensor made of a weight, in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = [self.conv.weight.detach().clone()]


class Hidden(Plain):
    """A layer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(4, 4)]


class HiddenData(Plain):
    """A tensor that is filled through another view of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.zeros(4)]
        self.hidden[0].data.normal_()


class Rejected(Plain):
    """Random numbers that are drawn again until they lie within bounds."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.trunc_normal_(self.fc.weight, std=0.02, a=-0.02, b=0.02)


class Drawn(Plain):
    """Random numbers in another way, after some that were left out."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.rand(4)


def file_of(kind: Callable[[], nn.Module], folder: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(1)
    state = {key: torch.randn_like(value) if value.is_floating_point() else value
             for key, value in kind().state_dict().items()}  # fmt: skip
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt", state


def read(kind: type[nn.Module], folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    path, state = file_of(kind, folder)
    torch.manual_seed(2)
    module = read_model(path, factory=f"{__file__}:{kind.__name__}").module
    assert module is not None
    return module, state


def test_a_plain_module_is_built_once_without_random_numbers(tmp_path: Path) -> None:
    drawn = torch.random.get_rng_state()
    building = Uninitialised()
    with building:
        module = Plain()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not building.spoilt
    assert not building.were_loaded()
    _, state = file_of(Plain, tmp_path)
    module.load_state_dict(state)
    assert building.were_loaded()


def test_its_weights_are_those_of_the_file(tmp_path: Path) -> None:
    module, state = read(Plain, tmp_path)
    held = module.state_dict()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[key], value) for key, value in state.items())


@pytest.mark.parametrize("kind", [OwnBuffer, FilledBuffer, Derived, Copied, Hidden, HiddenData, Rejected, Drawn])
def test_where_it_could_be_seen_the_module_is_what_its_constructor_makes(kind: type[nn.Module], tmp_path: Path) -> None:
    building = Uninitialised()
    with building:
        module = kind()
    module.load_state_dict(file_of(kind, tmp_path)[1])
    assert building.spoilt or not building.were_loaded()
    module, state = read(kind, tmp_path)
    torch.manual_seed(2)
    own = kind()
    if kind is Derived:
        assert module.scale == own.scale
    for name in ("codes", "first", "hidden", "offset"):
        ours, theirs = getattr(module, name, None), getattr(own, name, None)
        if isinstance(ours, list):
            ours, theirs = ours[0], theirs[0]  # type: ignore[index]
        if isinstance(ours, nn.Linear):
            ours, theirs = ours.weight, theirs.weight  # type: ignore[union-attr]
        if isinstance(ours, Tensor):
            assert ours.shape == theirs.shape  # type: ignore[union-attr]
            assert 0 < float(ours.abs().max()) < 6
            assert float(ours.std()) > 0.01
    held = module.state_dict()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[key], value) for key, value in state.items())
