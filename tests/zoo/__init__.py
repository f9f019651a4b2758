"""The networks that the tests compile: small, faithful to the public code of their kind, settled as if trained.

`ARCHITECTURES` and `FAMILIES` map a name to a factory that gives the same network in eval mode at each call;
`example_inputs(name)` gives the arguments to call it with.
"""

from collections.abc import Callable

from torch import nn

from . import (
    attention,
    calling,
    classic,
    densenet,
    detection,
    efficient,
    generative,
    inception,
    layers,
    mobile,
    pretrained,
    resnets,
    segmentation,
    sequences,
    yolo,
)
from .common import Entry, Inputs, settle

__all__ = ["ARCHITECTURES", "FAMILIES", "any_batch", "example_inputs", "pretrained", "settle"]

_MAIN: dict[str, Entry] = (
    resnets.ARCHITECTURES
    | inception.ARCHITECTURES
    | densenet.ARCHITECTURES
    | mobile.ARCHITECTURES
    | efficient.ARCHITECTURES
    | segmentation.ARCHITECTURES
)
_MORE: dict[str, Entry] = (
    classic.FAMILIES
    | resnets.FAMILIES
    | inception.FAMILIES
    | efficient.FAMILIES
    | segmentation.FAMILIES
    | detection.FAMILIES
    | yolo.FAMILIES
    | generative.FAMILIES
    | sequences.FAMILIES
    | attention.FAMILIES
    | layers.FAMILIES
    | calling.FAMILIES
)
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = dict(_MAIN)
FAMILIES: dict[str, Callable[[], nn.Module]] = dict(_MORE)


def example_inputs(name: str, batch: int = 2) -> Inputs:
    """The `(args, kwargs)` of network `name` in either dict."""
    return (_MAIN | _MORE)[name].inputs(batch)


def any_batch(name: str) -> bool:
    """Whether network `name` takes batches of any size."""
    return (_MAIN | _MORE)[name].any_batch
