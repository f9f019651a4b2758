"""The networks that other tests compile must be worth compiling: alive, deterministic, with statistics that matter."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo import ARCHITECTURES, FAMILIES, any_batch, example_inputs, pretrained

ALL = ARCHITECTURES | FAMILIES
PRETRAINED = [pretrained.load_rnet, pretrained.load_onet, pretrained.load_crepe_tiny]


@torch.no_grad()
def tensors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*args, **(kwargs or {}))) if isinstance(leaf, Tensor)]


def moved(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative change in any output tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True) if b.is_floating_point()
    )


def assert_alive(outputs: list[Tensor]) -> None:
    assert outputs
    for output in outputs:
        assert output.isfinite().all()
        if output.is_floating_point():
            assert 1e-2 < output.abs().max() < 1e3
            assert output.std() > 1e-2 * output.abs().max(), "all but constant"


def assert_follows_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before = tensors(model, args, kwargs)
    for reverse in (lambda t: t.flip(0), lambda t: -t):
        other_args, other_kwargs = tree_map_only(Tensor, reverse, (args, kwargs))
        assert moved(before, tensors(model, other_args, other_kwargs)) > 1e-2


def test_there_are_eight_architectures_and_thirty_families() -> None:
    required = {"vgg", "resnet", "inception_v3", "densenet", "mobilenet_v3", "shufflenet_v2", "efficientnet", "unet"}
    assert required <= set(ARCHITECTURES)
    assert len(FAMILIES) >= 30
    assert not set(ARCHITECTURES) & set(FAMILIES)


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_alive_deterministic_and_follow_the_input(name: str) -> None:
    state = torch.random.get_rng_state()
    model, again = ALL[name](), ALL[name]()
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state was touched"
    assert not any(module.training for module in model.modules())
    args, kwargs = example_inputs(name)
    outputs = tensors(model, args, kwargs)
    assert_alive(outputs)
    for other in (tensors(model, args, kwargs), tensors(again, *example_inputs(name))):
        assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))
    assert_follows_input(model, args, kwargs)


@pytest.mark.parametrize("name", [name for name in ALL if any_batch(name)])
def test_a_sample_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    model = ALL[name]()
    one, three = (tensors(model, *example_inputs(name, batch)) for batch in (1, 3))
    for a, b in zip(one, three, strict=True):
        axis = next(i for i in range(a.ndim) if (a.shape[i], b.shape[i]) == (1, 3))
        assert a.shape == b.narrow(axis, 0, 1).shape
        assert (a - b.narrow(axis, 0, 1)).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_left_alone_and_float64_agrees(name: str) -> None:
    model = ALL[name]()
    args, kwargs = example_inputs(name)
    single = tensors(model, args, kwargs)
    kept = tree_leaves(example_inputs(name))
    given = tree_leaves((args, kwargs))
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(given, kept, strict=True))
    wide_args, wide_kwargs = tree_map_only(Tensor, Tensor.double, (args, kwargs))
    double = tensors(model.double(), wide_args, wide_kwargs)
    for a, b in zip(single, double, strict=True):
        assert b.dtype == (torch.float64 if a.is_floating_point() else a.dtype)
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_norm_statistics_are_not_trivial(name: str) -> None:
    norms = [module for module in ALL[name]().modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        assert norm.running_mean.abs().max() > 1e-2
        assert (norm.running_var - 1).abs().max() > 1e-2
        assert norm.running_var.min() > 0
    gammas: list[Tensor] = [norm.weight for norm in norms if norm.weight is not None]
    if sum(gamma.numel() for gamma in gammas) >= 64:
        share = torch.cat(gammas).lt(0).float().mean()
        assert 0.01 < share < 0.4


def test_auxiliary_heads_work_in_training_only() -> None:
    model = ALL["googlenet"]()
    args, _ = example_inputs("googlenet")
    assert len(tensors(model, args)) == 1
    assert len(tensors(model.train(), args)) == 3


@pytest.mark.parametrize("load", PRETRAINED)
def test_pretrained_networks_are_alive_and_follow_the_input(load: Any) -> None:
    model, args = load()
    assert not any(module.training for module in model.modules())
    assert_alive(tensors(model, args))
    assert_follows_input(model, args, {})
    assert [out.shape for out in tensors(model, args)] == [out.shape for out in tensors(load()[0], args)]


def test_crepe_hears_a_fifth() -> None:
    """220 Hz and 330 Hz are 702 cents apart; a bin of CREPE is 20 cents."""
    model, args = pretrained.load_crepe_tiny()
    low, high = tensors(model, args)[0].argmax(1).tolist()
    assert abs((high - low) * 20 - 1200 * math.log2(330 / 220)) <= 40


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps facenet-pytorch==2\.6\.0"):
        pretrained.load_rnet()
