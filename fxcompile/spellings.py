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

STATELESS: dict[str, tuple[type[nn.Module], str]] = {
    # activations
    "relu": (nn.ReLU, "inplace"),
    "relu6": (nn.ReLU6, "inplace"),
    "hardtanh": (nn.Hardtanh, "min_val max_val inplace"),
    "leaky_relu": (nn.LeakyReLU, "negative_slope inplace"),
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
    "softsign": (nn.Softsign, ""),
    "logsigmoid": (nn.LogSigmoid, ""),
    "log_sigmoid": (nn.LogSigmoid, ""),
    "tanhshrink": (nn.Tanhshrink, ""),
    "softshrink": (nn.Softshrink, "lambd"),
    "hardshrink": (nn.Hardshrink, "lambd"),
    "threshold": (nn.Threshold, "threshold value inplace"),
    "glu": (nn.GLU, "dim"),
    "softmax": (nn.Softmax, "dim"),
    "log_softmax": (nn.LogSoftmax, "dim"),
    "softmin": (nn.Softmin, "dim"),
    # pools
    "max_pool1d": (nn.MaxPool1d, "kernel_size stride padding dilation ceil_mode return_indices"),
    "max_pool2d": (nn.MaxPool2d, "kernel_size stride padding dilation ceil_mode return_indices"),
    "max_pool3d": (nn.MaxPool3d, "kernel_size stride padding dilation ceil_mode return_indices"),
    "avg_pool1d": (nn.AvgPool1d, "kernel_size stride padding ceil_mode count_include_pad"),
    "avg_pool2d": (nn.AvgPool2d, "kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    "avg_pool3d": (nn.AvgPool3d, "kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, "output_size"),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, "output_size"),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, "output_size"),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d, "output_size return_indices"),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, "output_size return_indices"),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d, "output_size return_indices"),
    "lp_pool1d": (nn.LPPool1d, "norm_type kernel_size stride ceil_mode"),
    "lp_pool2d": (nn.LPPool2d, "norm_type kernel_size stride ceil_mode"),
    # dropout; `training` says only in which mode the model was traced
    "dropout": (nn.Dropout, "p training inplace"),
    "dropout1d": (nn.Dropout1d, "p training inplace"),
    "dropout2d": (nn.Dropout2d, "p training inplace"),
    "dropout3d": (nn.Dropout3d, "p training inplace"),
    "feature_dropout": (nn.Dropout2d, "p training inplace"),
    "alpha_dropout": (nn.AlphaDropout, "p training inplace"),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout, "p training inplace"),
    # rearrangements and normalisation without weights
    "pixel_shuffle": (nn.PixelShuffle, "upscale_factor"),
    "pixel_unshuffle": (nn.PixelUnshuffle, "downscale_factor"),
    "channel_shuffle": (nn.ChannelShuffle, "groups"),
    "local_response_norm": (nn.LocalResponseNorm, "size alpha beta k"),
}
"""Operations without weights that become a layer: its class, and the operation's arguments after the input."""

LAYER_ONLY_ARGUMENTS = {"inplace", "training"}
"""Arguments in those lists that say how to run, not what to compute; a canonical layer does not take them."""

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
}
"""Operations that take weights: their arguments after the input. `functional.` marks another order there."""

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
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "iadd": operator.add,
    "isub": operator.sub,
    "imul": operator.mul,
    "itruediv": operator.truediv,
}
"""Elementwise arithmetic: spelled as Python's operators, which take tensors and numbers on both sides."""

SAME_FUNCTION: dict[str, Callable[..., Any]] = {
    "matmul": torch.matmul,
    "bmm": torch.matmul,
    "mm": torch.matmul,
    "pow": torch.pow,
    "absolute": torch.abs,
    "clip": torch.clamp,
    "concat": torch.cat,
    "concatenate": torch.cat,
    "swapaxes": torch.transpose,
    "swapdims": torch.transpose,
    "expand_as": torch.Tensor.expand_as,
}
"""Other functions that go by several names."""

ALIKE = frozenset("""
    abs exp log log2 log10 log1p expm1 sqrt rsqrt square reciprocal sign sin cos tan asin acos atan atan2 sinh cosh erf
    floor ceil round trunc clamp clamp_min clamp_max minimum maximum where stack einsum outer cross baddbmm topk sort
    argmax argmin argsort max min prod std var norm gather scatter scatter_add index_select index_add take_along_dim
    masked_fill logical_and logical_or logical_not isnan isinf isfinite tile roll flip tril triu all any logsumexp
    cumprod lerp addcmul addcdiv nan_to_num zeros_like ones_like full_like movedim unflatten repeat_interleave
""".split())
"""Functions that are `torch.NAME` with the same arguments in the same order, whether a method, an `aten` operator or
a function."""

IDENTITIES = {"contiguous", "alias", "lift_fresh_copy", "lift_fresh", "clone", "requires_grad", "lift"}
"""Operations that only say how a tensor lies in memory; nothing works in place, so a copy is the tensor itself."""

DROPPED = {"_assert", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size"}
"""Checks at run time that compute nothing."""
