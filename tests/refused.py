"""Models that no graph can hold, as functions of a model with a convolution: `# here` marks the line to blame."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCH = "branches on, or loops over, a value", "use torch.where, or move the branch out of forward"
NUMBER = "takes a number out of a tensor", "keep the value in a tensor"
NUMPY = "leaves torch for numpy", "use the torch operation of the same name"
RANDOM = "forward draws random numbers", "make the noise an input of forward, or draw it in training mode only"
CHANGES = "depends on something that changes from call to call", "make that an input of forward"
STATE = "forward updates the model's own tensor", "compute the new value and return it"
SHAPE = "gives as its result depends on values", "use an operation whose result always has the same shape"
MASK = "picks out as its result depends on values", SHAPE[1]
VIEW = "writes in place to memory that another view reads", "use the out-of-place form of that operation"
FAILS = (
    "the model fails on the example inputs (x: 2x3x5x6 float32)",
    "give the inputs that forward takes, with their batch axis (--input-shape 1x3x224x224)",
)

REFUSED: dict[str, tuple[Callable[..., Any], str, str]] = {}
"""By name: the forward, what is said of it, and what mends it."""


def refused(expected: tuple[str, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function, as a model's forward, is refused so; the line to blame ends with `# here`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        REFUSED[function.__name__] = (function, *expected)
        return function

    return register


@refused(BRANCH)
def branch(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    if y.mean() > 0:  # here
        return y
    return -y


@refused(BRANCH)
def loop(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    for _ in range(int(y.abs().max())):  # here
        y = y + 1
    return y


@refused(BRANCH)
def swallowed_branch(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    try:
        if y.sum() > 0:  # here
            return y
    except Exception:
        pass
    return y * 2


@refused(BRANCH)
def while_loop(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    while y.abs().max() > 0.5:  # here
        y = y / 2
    return y


@refused(BRANCH)
def guard(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    if torch.isnan(y).any():  # here
        raise ValueError("not finite")
    return y


@refused(NUMBER)
def item(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    scale = y.abs().max().item()  # here
    return y / scale


@refused(NUMBER)
def number_in_a_helper(m: Any, x: Tensor) -> Tensor:
    def scaled(y: Tensor) -> Tensor:
        return y * y.max().item()  # here

    return scaled(m.conv(x))


@refused(NUMBER)
def to_list(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    means = y.mean((0, 2, 3)).tolist()  # here
    return y * means[0]


@refused(NUMBER)
def new_tensor(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.tensor([y.mean(), y.std()])  # here


@refused(NUMBER)
def text(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.note = f"{y.mean():.3f}"  # here
    return y


@refused(NUMPY)
def numpy(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.from_numpy(np.tanh(y.detach().numpy()))  # here


@refused(NUMPY)
def numpy_array(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y + float(np.asarray(y.detach()).mean())  # here


@refused(RANDOM)
def noise(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y + torch.randn_like(y)  # here


@refused(RANDOM)
def noise_of_fixed_shape(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + torch.rand(4, 1, 1)  # here


@refused(RANDOM)
def noise_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    drawn = torch.empty_like(y).normal_()  # here
    return y + drawn


@refused(RANDOM)
def dropout_in_eval_mode(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.conv(x), 0.5)  # here


@refused(RANDOM)
def permutation(m: Any, x: Tensor) -> Tensor:
    return m.conv(x)[:, torch.randperm(4)]  # here


@refused(CHANGES)
def python_random(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * random.random()  # here


@refused(CHANGES)
def numpy_random(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y * np.random.default_rng().random()  # here


@refused(CHANGES)
def counter(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.conv(x) * m.count  # here


@refused(CHANGES)
def global_state(m: Any, x: Tensor) -> Tensor:
    GLOBAL["calls"] += 1
    return m.conv(x) + GLOBAL["calls"]  # here


GLOBAL = {"calls": 0}


@refused(CHANGES)
def list_across_calls(m: Any, x: Tensor) -> Tensor:
    m.seen.append(x.mean())
    return m.conv(x) - sum(m.seen)  # here


@refused(CHANGES)
def last_frame(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    if m.last is not None and m.last.shape == y.shape:
        y = y + m.last
    m.last = y  # here
    return y


@refused(STATE)
def buffer_in_place(m: Any, x: Tensor) -> Tensor:
    m.other = x.mean()
    m.average.mul_(0.9).add_(x.mean())  # here
    return m.conv(x) - m.average


@refused(STATE)
def buffer_assigned(m: Any, x: Tensor) -> Tensor:
    m.other = x.mean()
    m.average = 0.9 * m.average + x.mean()  # here
    return m.conv(x) - m.average


@refused(STATE)
def buffer_indexed(m: Any, x: Tensor) -> Tensor:
    m.average[0] += x.mean()  # here
    return m.conv(x) - m.average


@refused(STATE)
def statistics_of_a_norm(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return F.batch_norm(y, m.mean, m.var, training=True)  # here


@refused(STATE)
def weights_in_place(m: Any, x: Tensor) -> Tensor:
    m.conv.weight.data.clamp_(-0.1, 0.1)  # here
    return m.conv(x)


@refused(STATE)
def weights_decayed(m: Any, x: Tensor) -> Tensor:
    m.conv.weight.data = m.conv.weight.data * 0.9  # here
    return m.conv(x)


@refused(STATE)
def layer_made_in_forward(m: Any, x: Tensor) -> Tensor:
    m.head = nn.Conv2d(4, 4, 1)  # here
    return m.head(m.conv(x))


@refused(SHAPE)
def unique(m: Any, x: Tensor) -> Tensor:
    return torch.unique(m.conv(x).round())  # here


@refused(SHAPE)
def nonzero(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.nonzero(y > 0.5)  # here


@refused(SHAPE)
def masked_select(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.masked_select(y, y > 0)  # here


@refused(SHAPE)
def where_alone(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    places = torch.where(y > 0)  # here
    return y[places]


@refused(SHAPE)
def repeated_as_told(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    times = 1 + 1000 * y.mean((0, 2, 3)).abs()
    return y.repeat_interleave(times.long(), 1)  # here


@refused(MASK)
def mask(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y[y > 0]  # here


@refused(VIEW)
def overlapping_views(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).contiguous()
    y.unfold(3, 3, 1).mul_(2)  # here
    return y


@refused(("forward computes under autocast", "take autocast out of forward"))
def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.conv(x)  # here
    return y.relu()


@refused(("the higher-order operation 'cond'", "write that part with plain torch operations"))
def functional_branch(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y * 2, (y,))  # here


@refused(("forward computes gradients", "write the derivative as operations"))
def gradient(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (given,) = torch.autograd.grad(m.conv(x).sum(), x)  # here
    return given


@refused(FAILS)
def raises(m: Any, x: Tensor) -> Tensor:
    raise ValueError("no such head")  # here


@refused(FAILS)
def wrong_view(m: Any, x: Tensor) -> Tensor:
    return m.conv(x).view(-1, 7)  # here
