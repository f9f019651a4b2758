"""What every network of the zoo shares: an entry, its inputs, and weights as if it had been trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LINEAR_KINDS = {
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
}


def floats(*shape: int) -> Callable[[int], Inputs]:
    """One float32 tensor [batch, *shape], the input of most networks, drawn from a seed of its own."""

    def draw(batch: int) -> Inputs:
        return (draw_normal(batch, *shape),), {}

    return draw


def draw_normal(batch: int, *shape: int, seed: int = 0) -> Tensor:
    """Noise around a level of its own for each sample and channel, so that global averages tell samples apart.

    A sample depends on its index, shape and seed alone: it is the same in a batch of any size.
    """
    level = (shape[0],) + (1,) * (len(shape) - 1)
    samples = []
    for i in range(batch):
        rng = torch.Generator().manual_seed(1000 * seed + i)
        samples.append(0.8 * torch.randn(shape, generator=rng) + 0.6 * torch.randn(level, generator=rng))
    return torch.stack(samples)


@dataclass(frozen=True)
class Entry:
    """A network: how to build it, and how to make its (args, kwargs) for a batch size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    seed: int = 0
    any_batch: bool = True

    def __call__(self) -> nn.Module:
        """The same settled network in eval mode at each call; the caller's random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.build()
            args, kwargs = self.inputs(8 if self.any_batch else 2)
            return settle(model, self.seed, *args, **kwargs)


@torch.no_grad()
def settle(model: nn.Module, seed: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Give `model` weights and statistics such as training leaves, and put it in eval mode.

    Affine parameters of norms are drawn, about one gamma in eight negative. Then one pass over `args` visits the
    layers in the order of the data. A trainable linear layer is scaled, and its bias moved, until its channels vary
    with a size of about 1 (half to double) around means of about 0; a batch norm takes the statistics of what it
    receives, perturbed. So activations neither die out nor explode, however deep the network, outputs depend on
    inputs more than on biases, and no statistic is trivial. Without `args` the statistics are drawn around 0 and 1.
    """
    rng = torch.Generator().manual_seed(seed)
    model.eval()
    for module in model.modules():
        _draw_parameters(module, rng)
    if not args and not kwargs:
        return model
    seen: set[int] = set()
    hooks = [m.register_forward_hook(_scaler(seen, rng)) for m in model.modules() if type(m) in _LINEAR_KINDS]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    hooks += [m.register_forward_pre_hook(_estimator(seen, rng)) for m in norms]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return model


def _uniform(like: Tensor, low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=rng) * (high - low) + low


def _draw_parameters(module: nn.Module, rng: torch.Generator) -> None:
    if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
        module.running_mean.copy_(_uniform(module.running_mean, -0.5, 0.5, rng))
        module.running_var.copy_(_uniform(module.running_var, 0.5, 2.0, rng))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(1000)
    if isinstance(module, (_BatchNorm, *_NORMS)) and module.weight is not None:
        sign = torch.where(torch.rand(module.weight.shape, generator=rng) < 1 / 8, -1.0, 1.0)
        module.weight.copy_(_uniform(module.weight, 0.5, 1.5, rng) * sign)
        if module.bias is not None:
            module.bias.copy_(_uniform(module.bias, -0.5, 0.5, rng))
    elif isinstance(module, nn.PReLU):
        module.weight.copy_(_uniform(module.weight, 0.05, 0.5, rng))


def _scaler(seen: set[int], rng: torch.Generator) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or not weight.requires_grad or id(weight) in seen:
            return None
        seen.add(id(weight))
        last = -1 if isinstance(module, nn.Linear) else 1
        channels = output.movedim(last, -1)
        mean, var = channels.flatten(0, -2).mean(0), channels.flatten(0, -2).var(0, correction=0)
        spread = float(torch.maximum(var.mean(), 0.01 * output.var()).sqrt())
        if spread < 1e-8:
            return None
        factor = 2 ** float(torch.rand((), generator=rng) * 2 - 1) / spread
        weight.mul_(factor)
        if bias is None:
            return output * factor
        shift = _uniform(bias, -0.5, 0.5, rng) - mean * factor
        bias.mul_(factor).add_(shift)
        return (channels * factor + shift).movedim(-1, last)

    return scale


def _estimator(seen: set[int], rng: torch.Generator) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def estimate(module: Any, args: tuple[Tensor, ...]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        channels = args[0].transpose(0, 1).flatten(1)
        mean, var = channels.mean(1), channels.var(1, correction=0)
        var += 0.05 * var.mean() + 1e-6  # a channel that is all but constant is not blown up
        module.running_mean.copy_(mean + var.sqrt() * _uniform(mean, -0.3, 0.3, rng))
        module.running_var.copy_(var * _uniform(var, 0.7, 1.4, rng))

    return estimate
