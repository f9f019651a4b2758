"""Tables: which names PyTorch has for an operation, and which arguments it takes, in order.

An operation is known by its bare name, as written in `torch`, `torch.nn.functional`, `Tensor` methods and `aten`
(where a trailing underscore, the in-place form, has been dropped). The names of its arguments follow the input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MAX_POOL = "kernel_size stride padding dilation ceil_mode return_indices"
_AVG_POOL = "kernel_size stride padding ceil_mode count_include_pad divisor_override"

STATELESS: dict[str, tuple[type[nn.Module], str]] = {
    # activations
    "relu": (nn.ReLU, "inplace"),
    "relu6": (nn.ReLU6, "inplace"),
    "hardtanh": (nn.Hardtanh, "min_val max_val inplace"),
    "leaky_relu": (nn.LeakyReLU, "negative_slope inplace"),
    "rrelu": (nn.RReLU, "lower upper training inplace"),
    "elu": (nn.ELU, "alpha inplace"),
    "selu": (nn.SELU, "inplace"),
    "celu": (nn.CELU, "alpha inplace"),
    "gelu": (nn.GELU, "approximate"),
    "silu": (nn.SiLU, "inplace"),
    "mish": (nn.Mish, "inplace"),
    "hardswish": (nn.Hardswish, "inplace"),
    "hardsigmoid": (nn.Hardsigmoid, "inplace"),
    "sigmoid": (nn.Sigmoid, ""),
    "tanh": (nn.Tanh, ""),
    "softplus": (nn.Softplus, "beta threshold"),
    "logsigmoid": (nn.LogSigmoid, ""),
    "log_sigmoid": (nn.LogSigmoid, ""),
    "softshrink": (nn.Softshrink, "lambd"),
    "hardshrink": (nn.Hardshrink, "lambd"),
    "threshold": (nn.Threshold, "threshold value inplace"),
    "glu": (nn.GLU, "dim"),
    "softmax": (nn.Softmax, "dim"),
    "log_softmax": (nn.LogSoftmax, "dim"),
    # pools
    "max_pool1d": (nn.MaxPool1d, _MAX_POOL),
    "max_pool2d": (nn.MaxPool2d, _MAX_POOL),
    "max_pool3d": (nn.MaxPool3d, _MAX_POOL),
    "avg_pool1d": (nn.AvgPool1d, "kernel_size stride padding ceil_mode count_include_pad"),
    "avg_pool2d": (nn.AvgPool2d, _AVG_POOL),
    "avg_pool3d": (nn.AvgPool3d, _AVG_POOL),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, "output_size"),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, "output_size"),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, "output_size"),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d, "output_size return_indices"),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, "output_size return_indices"),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d, "output_size return_indices"),
    # dropout; `training` says only in which mode the model was traced
    "dropout": (nn.Dropout, "p training inplace"),
    "dropout1d": (nn.Dropout1d, "p training inplace"),
    "dropout2d": (nn.Dropout2d, "p training inplace"),
    "dropout3d": (nn.Dropout3d, "p training inplace"),
    "feature_dropout": (nn.Dropout2d, "p training inplace"),
    "alpha_dropout": (nn.AlphaDropout, "p training inplace"),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout, "p training inplace"),
    # rearrangements
    "pixel_shuffle": (nn.PixelShuffle, "upscale_factor"),
    "pixel_unshuffle": (nn.PixelUnshuffle, "downscale_factor"),
    "channel_shuffle": (nn.ChannelShuffle, "groups"),
}
"""Operations without weights that become a layer: its class, and the operation's arguments after the input."""

LAYER_ONLY_ARGUMENTS = {"inplace", "training"}
"""Arguments in those lists that say how to run, not what to compute; a canonical layer does not take them."""

WITH_INDICES = {
    f"{kind}_pool{d}d_with_indices": f"{kind}_pool{d}d" for kind in ("max", "adaptive_max") for d in (1, 2, 3)
}
"""Pools that also return where each maximum was, by `aten`'s name; `torch.nn` has an argument for it."""

RANDOM_IN_TRAINING = {name for name, (_, arguments) in STATELESS.items() if "training" in arguments.split()}
"""Operations that draw random numbers unless `training` is False."""

TRAINING_BY_DEFAULT = RANDOM_IN_TRAINING - {"rrelu", "alpha_dropout", "feature_alpha_dropout"}
"""Those of `torch.nn.functional` that do so if they are not told."""

WEIGHTED: dict[str, str] = {
    "conv1d": "weight bias stride padding dilation groups",
    "conv2d": "weight bias stride padding dilation groups",
    "conv3d": "weight bias stride padding dilation groups",
    "conv_transpose1d": "weight bias stride padding output_padding groups dilation",
    "conv_transpose2d": "weight bias stride padding output_padding groups dilation",
    "conv_transpose3d": "weight bias stride padding output_padding groups dilation",
    "convolution": "weight bias stride padding dilation transposed output_padding groups",
    "linear": "weight bias",
    "functional.batch_norm": "running_mean running_var weight bias training momentum eps",
    "batch_norm": "weight bias running_mean running_var training momentum eps cudnn_enabled",
    "functional.instance_norm": "running_mean running_var weight bias use_input_stats momentum eps",
    "instance_norm": "weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    "group_norm": "num_groups weight bias eps cudnn_enabled",
    "layer_norm": "normalized_shape weight bias eps cudnn_enabled",
    "rms_norm": "normalized_shape weight eps",
    "prelu": "weight",
    "_native_batch_norm_legit_no_training": "weight bias running_mean running_var momentum eps",
    "native_layer_norm": "normalized_shape weight bias eps",
    "native_group_norm": "weight bias batch channels positions num_groups eps",
}
"""Operations that take weights: their arguments after the input. `functional.` marks another order there."""

NATIVE_NORMS = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
}
"""Functionalised norms of `aten`, which return (output, mean, rstd); the layer gives the output alone."""

TENSOR_ARGUMENTS = ("weight", "bias", "running_mean", "running_var")
"""Arguments of those operations that are weights or statistics."""

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "subtract": operator.sub,
    "mul": operator.mul,
    "multiply": operator.mul,
    "div": operator.truediv,
    "divide": operator.truediv,
    "truediv": operator.truediv,
    "true_divide": operator.truediv,
    "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv,
    "mod": operator.mod,
    "remainder": operator.mod,
    "neg": operator.neg,
    "negative": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "not_equal": operator.ne,
    "lt": operator.lt,
    "less": operator.lt,
    "le": operator.le,
    "less_equal": operator.le,
    "gt": operator.gt,
    "greater": operator.gt,
    "ge": operator.ge,
    "greater_equal": operator.ge,
    "and_": operator.and_,
    "__and__": operator.and_,
    "__iand__": operator.and_,
    "bitwise_and": operator.and_,
    "or_": operator.or_,
    "__or__": operator.or_,
    "__ior__": operator.or_,
    "bitwise_or": operator.or_,
    "xor": operator.xor,
    "__xor__": operator.xor,
    "__ixor__": operator.xor,
    "bitwise_xor": operator.xor,
    "invert": operator.invert,
    "bitwise_not": operator.invert,
}
"""Elementwise arithmetic: spelled as Python's operators, which take tensors and numbers on both sides."""

COMMUTATIVE = {operator.add, operator.mul, operator.and_, operator.or_, operator.xor}
"""Operators whose operands may change places: a number comes second."""

ALIASES: dict[str, str] = {
    "_threshold": "threshold",
    "absolute": "abs",
    "bmm": "matmul",
    "mm": "matmul",
    "clip": "clamp",
    "arccos": "acos",
    "arcsin": "asin",
    "arctan": "atan",
    "arctan2": "atan2",
    "fix": "trunc",
    "linalg_norm": "norm",
    "unsafe_chunk": "chunk",
    "unsafe_split": "split",
    "unsafe_split_with_sizes": "split",
    "split_with_sizes": "split",
    "concat": "cat",
    "concatenate": "cat",
    "special_expit": "sigmoid",
    "expit": "sigmoid",
    "special_erf": "erf",
    "vector_norm": "linalg_vector_norm",
    "broadcast_to": "expand",
    "grid_sampler": "grid_sample",
    "grid_sampler_2d": "grid_sample",
    "grid_sampler_3d": "grid_sample",
    "affine_grid_generator": "affine_grid",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "_unsafe_view": "reshape",
    "view": "reshape",
    "view_copy": "reshape",
    "sym_size": "size",
    "_to_copy": "to",
    "_unique2": "unique",
    "unique_dim": "unique",
    "nonzero_numpy": "nonzero",
    "index_put_impl": "index_put",
}
"""Names of the same operation with the same arguments."""

IDENTITIES = frozenset(
    [
        "contiguous",
        "alias",
        "lift_fresh_copy",
        "lift_fresh",
        "lift",
        "clone",
        "detach",
        "requires_grad",
        "cpu",
        "pin_memory",
        "positive",
    ]
)
"""Operations that only say how a tensor lies in memory; nothing works in place, so a copy is the tensor itself."""

DROPPED = frozenset(
    [
        "_assert",
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range_for_size",
        "sym_constrain_range",
    ]
)
"""Checks at run time that compute nothing."""

RANDOM = frozenset(
    [
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "bernoulli",
        "multinomial",
        "poisson",
        "rand_like",
        "randn_like",
        "randint_like",
        "uniform",
        "random",
        "exponential",
        "geometric",
        "cauchy",
        "log_normal",
        "gumbel_softmax",
        "native_dropout",
    ]
)
"""Operations that draw random numbers."""

TAKES_NUMBERS = frozenset(["item", "_local_scalar_dense", "tolist", "numpy"])
"""Operations that leave tensors for Python's numbers."""

UNKNOWN_SHAPE = frozenset(
    [
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
    ]
)
"""Operations whose result has a shape that depends on values."""

DTYPE_METHODS: dict[str, torch.dtype] = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
    "short": torch.int16,
    "char": torch.int8,
    "byte": torch.uint8,
    "bool": torch.bool,
}
"""Methods that are `to(dtype)`."""
