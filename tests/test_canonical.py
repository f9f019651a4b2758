"""Canonical form is one spelling, however the model writes it and whichever road it comes by."""

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import Written, form, roads
from torch import Tensor, nn

from fxcompile.comparing import relative_maximum
from fxcompile.program import Program
from fxcompile.tracing import trace

IMAGE, SIGNAL, TOKENS, VOLUME = (2, 4, 6, 8), (2, 4, 9), (2, 5, 8), (2, 2, 4, 6, 4)
Spelling = Callable[..., Any]

ACTIVATIONS: dict[str, tuple[str, list[Spelling]]] = {
    "relu": (
        "ReLU()",
        [
            nn.ReLU(),
            nn.ReLU(inplace=True),
            F.relu,
            torch.relu,
            Tensor.relu,
            lambda x: F.relu(x, True),
            lambda x: F.relu(input=x, inplace=True),
            torch.relu_,
            Tensor.relu_,
        ],
    ),
    "relu6": (
        "ReLU6()",
        [
            nn.ReLU6(),
            nn.ReLU6(True),
            F.relu6,
            lambda x: F.relu6(x, inplace=True),
            nn.Hardtanh(0, 6),
            lambda x: F.hardtanh(x, 0.0, 6.0),
        ],
    ),
    "hardtanh": (
        "Hardtanh(min_val=-2, max_val=2)",
        [
            nn.Hardtanh(-2, 2),
            lambda x: F.hardtanh(x, -2, 2),
            lambda x: F.hardtanh(x, min_val=-2, max_val=2, inplace=True),
        ],
    ),
    "leaky_relu": (
        "LeakyReLU(negative_slope=0.1)",
        [
            nn.LeakyReLU(0.1),
            nn.LeakyReLU(0.1, inplace=True),
            lambda x: F.leaky_relu(x, 0.1),
            lambda x: F.leaky_relu_(x, 0.1),
            lambda x: F.leaky_relu(x, negative_slope=0.1, inplace=True),
        ],
    ),
    "rrelu": ("RReLU(lower=0.125, upper=0.3333333333333333)", [nn.RReLU(), F.rrelu]),
    "elu": (
        "ELU(alpha=0.5)",
        [nn.ELU(0.5), lambda x: F.elu(x, 0.5), lambda x: F.elu(x, alpha=0.5, inplace=True), lambda x: F.elu_(x, 0.5)],
    ),
    "selu": ("SELU()", [nn.SELU(), F.selu, torch.selu, lambda x: F.selu(x, True), torch.selu_]),
    "celu": (
        "CELU(alpha=2.0)",
        [nn.CELU(2.0), lambda x: F.celu(x, 2.0), lambda x: F.celu(x, 2.0, True), lambda x: torch.celu(x, 2.0)],
    ),
    "gelu": ("GELU(approximate='none')", [nn.GELU(), F.gelu, lambda x: F.gelu(x, approximate="none")]),
    "gelu_tanh": ("GELU(approximate='tanh')", [nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")]),
    "silu": (
        "SiLU()",
        [nn.SiLU(), nn.SiLU(True), F.silu, lambda x: F.silu(x, True), lambda x: F.silu(x, inplace=True)],
    ),
    "mish": ("Mish()", [nn.Mish(), F.mish, lambda x: F.mish(x, inplace=True), lambda x: F.mish(x, True)]),
    "hardswish": (
        "Hardswish()",
        [nn.Hardswish(), nn.Hardswish(inplace=True), F.hardswish, lambda x: F.hardswish(x, True)],
    ),
    "hardsigmoid": ("Hardsigmoid()", [nn.Hardsigmoid(), F.hardsigmoid, lambda x: F.hardsigmoid(x, True)]),
    "sigmoid": (
        "Sigmoid()",
        [nn.Sigmoid(), torch.sigmoid, Tensor.sigmoid, F.sigmoid, Tensor.sigmoid_, torch.special.expit],
    ),
    "tanh": ("Tanh()", [nn.Tanh(), torch.tanh, Tensor.tanh, F.tanh, Tensor.tanh_]),
    "softplus": (
        "Softplus(beta=2, threshold=10)",
        [nn.Softplus(2, 10), lambda x: F.softplus(x, 2, 10), lambda x: F.softplus(x, beta=2, threshold=10)],
    ),
    "logsigmoid": ("LogSigmoid()", [nn.LogSigmoid(), F.logsigmoid]),
    "softshrink": ("Softshrink(0.3)", [nn.Softshrink(0.3), lambda x: F.softshrink(x, 0.3)]),
    "hardshrink": (
        "Hardshrink(0.3)",
        [nn.Hardshrink(0.3), lambda x: F.hardshrink(x, 0.3), lambda x: x.hardshrink(0.3)],
    ),
    "threshold": (
        "Threshold(threshold=0.1, value=20)",
        [nn.Threshold(0.1, 20), lambda x: F.threshold(x, 0.1, 20), lambda x: F.threshold(x, 0.1, 20, True)],
    ),
    "glu": ("GLU(dim=1)", [nn.GLU(1), lambda x: F.glu(x, 1), lambda x: F.glu(x, dim=-3), nn.GLU(-3)]),
    "softmax": (
        "Softmax(dim=1)",
        [
            nn.Softmax(1),
            nn.Softmax(-3),
            nn.Softmax2d(),
            lambda x: F.softmax(x, 1),
            lambda x: F.softmax(x, dim=-3),
            lambda x: x.softmax(1),
            lambda x: x.softmax(dim=-3),
            lambda x: torch.softmax(x, dim=1),
        ],
    ),
    "log_softmax": (
        "LogSoftmax(dim=3)",
        [
            nn.LogSoftmax(-1),
            lambda x: F.log_softmax(x, -1),
            lambda x: x.log_softmax(dim=3),
            lambda x: torch.log_softmax(x, -1),
        ],
    ),
    "dropout": (
        "Dropout(p=0.3, inplace=False)",
        [
            nn.Dropout(0.3),
            nn.Dropout(0.3, inplace=True),
            lambda x: F.dropout(x, 0.3, False),
            lambda x: F.dropout(x, p=0.3, training=False, inplace=True),
            lambda x: torch.dropout(x, 0.3, train=False),
        ],
    ),
    "dropout2d": ("Dropout2d(p=0.3, inplace=False)", [nn.Dropout2d(0.3), lambda x: F.dropout2d(x, 0.3, False)]),
    "alpha_dropout": ("AlphaDropout(p=0.3, inplace=False)", [nn.AlphaDropout(0.3), lambda x: F.alpha_dropout(x, 0.3)]),
}
"""Layers without weights that keep the shape: the layer in canonical form, and how models write it."""

POOLS: dict[str, tuple[tuple[int, ...], str, list[Spelling]]] = {
    "max1d": (
        SIGNAL,
        "MaxPool1d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)",
        [nn.MaxPool1d(3, 2, 1), lambda x: F.max_pool1d(x, 3, 2, 1), lambda x: torch.max_pool1d(x, [3], [2], [1])],
    ),
    "max2d": (
        IMAGE,
        "MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)",
        [
            nn.MaxPool2d(2),
            nn.MaxPool2d((2, 2)),
            nn.MaxPool2d(2, 2),
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.max_pool2d(x, (2, 2), stride=(2, 2)),
            lambda x: torch.max_pool2d(x, 2),
            lambda x: F.max_pool2d(x, kernel_size=[2, 2], stride=[2, 2], padding=0, ceil_mode=False),
            lambda x: F.max_pool2d_with_indices(x, 2)[0],
        ],
    ),
    "max2d_uneven": (
        IMAGE,
        "MaxPool2d(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=1, ceil_mode=True)",
        [
            nn.MaxPool2d((3, 2), (2, 1), (1, 0), ceil_mode=True),
            lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), 1, True),
        ],
    ),
    "max3d": (
        VOLUME,
        "MaxPool3d(kernel_size=2, stride=1, padding=0, dilation=1, ceil_mode=False)",
        [nn.MaxPool3d(2, 1), lambda x: F.max_pool3d(x, 2, stride=1)],
    ),
    "avg1d": (
        SIGNAL,
        "AvgPool1d(kernel_size=(3,), stride=(2,), padding=(1,))",
        [nn.AvgPool1d(3, 2, 1), lambda x: F.avg_pool1d(x, 3, 2, 1)],
    ),
    "avg2d": (
        IMAGE,
        "AvgPool2d(kernel_size=3, stride=2, padding=1)",
        [
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            lambda x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False),
            lambda x: F.avg_pool2d(x, [3, 3], [2, 2], 1, False, False),
        ],
    ),
    "avg3d": (VOLUME, "AvgPool3d(kernel_size=2, stride=2, padding=0)", [nn.AvgPool3d(2), lambda x: F.avg_pool3d(x, 2)]),
    "global": (
        IMAGE,
        "AdaptiveAvgPool2d(output_size=1)",
        [
            nn.AdaptiveAvgPool2d(1),
            nn.AdaptiveAvgPool2d((1, 1)),
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
            nn.AvgPool2d((6, 8)),
            lambda x: F.avg_pool2d(x, (6, 8)),
            lambda x: F.avg_pool2d(x, x.shape[2:]),
            lambda x: F.avg_pool2d(x, (x.size(2), x.size(3))),
        ],
    ),
    "adaptive1d": (
        SIGNAL,
        "AdaptiveAvgPool1d(output_size=3)",
        [nn.AdaptiveAvgPool1d(3), lambda x: F.adaptive_avg_pool1d(x, 3)],
    ),
    "adaptive2d": (
        IMAGE,
        "AdaptiveAvgPool2d(output_size=(3, 2))",
        [
            nn.AdaptiveAvgPool2d((3, 2)),
            lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
            lambda x: F.interpolate(x, size=(3, 2), mode="area"),
        ],
    ),
    "adaptive3d": (
        VOLUME,
        "AdaptiveAvgPool3d(output_size=1)",
        [nn.AdaptiveAvgPool3d(1), lambda x: F.adaptive_avg_pool3d(x, (1, 1, 1))],
    ),
    "adaptive_max1d": (
        SIGNAL,
        "AdaptiveMaxPool1d(output_size=1)",
        [nn.AdaptiveMaxPool1d(1), lambda x: F.adaptive_max_pool1d(x, 1)],
    ),
    "adaptive_max2d": (
        IMAGE,
        "AdaptiveMaxPool2d(output_size=1)",
        [
            nn.AdaptiveMaxPool2d(1),
            lambda x: F.adaptive_max_pool2d(x, 1),
            lambda x: F.adaptive_max_pool2d(x, (1, 1), return_indices=True)[0],
        ],
    ),
    "pixel_shuffle": (
        IMAGE,
        "PixelShuffle(upscale_factor=2)",
        [nn.PixelShuffle(2), lambda x: F.pixel_shuffle(x, 2), lambda x: torch.pixel_shuffle(x, 2)],
    ),
    "pixel_unshuffle": (
        IMAGE,
        "PixelUnshuffle(downscale_factor=2)",
        [nn.PixelUnshuffle(2), lambda x: F.pixel_unshuffle(x, 2)],
    ),
    "channel_shuffle": (IMAGE, "ChannelShuffle(groups=2)", [nn.ChannelShuffle(2), lambda x: F.channel_shuffle(x, 2)]),
}
"""Layers without weights that change the shape: the input, the layer in canonical form, and how models write it."""

FUNCTIONS: dict[str, tuple[tuple[int, ...], str, list[Spelling]]] = {
    "add": (
        IMAGE,
        "add %1 %1",
        [
            lambda x: x + x,
            lambda x: torch.add(x, x),
            lambda x: x.add(x),
            lambda x: torch.add(x, other=x),
            lambda x: operator.add(x, x),
            lambda x: x.clone().add_(x),
            lambda x: torch.add(x, x, alpha=1),
        ],
    ),
    "add_number": (
        IMAGE,
        "add %1 2",
        [
            lambda x: x + 2,
            lambda x: 2 + x,
            lambda x: x.add(2),
            lambda x: torch.add(x, 2),
            lambda x: torch.add(x, 1, alpha=2),
            lambda x: x.clone().add_(2),
        ],
    ),
    "sub": (IMAGE, "sub %1 1.5", [lambda x: x - 1.5, lambda x: x.sub(1.5), lambda x: torch.subtract(x, 1.5)]),
    "rsub": (IMAGE, "sub 1 %0", [lambda x: 1 - x, lambda x: torch.rsub(x, 1)]),
    "mul": (
        IMAGE,
        "mul %1 3",
        [
            lambda x: x * 3,
            lambda x: 3 * x,
            lambda x: x.mul(3),
            lambda x: torch.mul(x, 3),
            lambda x: torch.multiply(x, 3),
            lambda x: x.clone().mul_(3),
        ],
    ),
    "div": (
        IMAGE,
        "truediv %1 3",
        [
            lambda x: x / 3,
            lambda x: x.div(3),
            lambda x: torch.true_divide(x, 3),
            lambda x: torch.div(x, 3, rounding_mode=None),
        ],
    ),
    "rdiv": (IMAGE, "reciprocal %1", [lambda x: 1 / x, torch.reciprocal, Tensor.reciprocal]),
    "floor_div": (
        IMAGE,
        "floordiv %1 3",
        [lambda x: x // 3, lambda x: torch.div(x, 3, rounding_mode="floor"), lambda x: x.floor_divide(3)],
    ),
    "neg": (IMAGE, "neg %1", [lambda x: -x, torch.neg, Tensor.neg, torch.negative]),
    "pow": (IMAGE, "pow %1 2", [lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, 2), torch.square]),
    "abs": (IMAGE, "abs %1", [abs, torch.abs, Tensor.abs, torch.absolute, lambda x: x.clone().abs_()]),
    "clamp": (
        IMAGE,
        "clamp %1 0 1",
        [
            lambda x: x.clamp(0, 1),
            lambda x: torch.clamp(x, min=0, max=1),
            lambda x: x.clip(0, 1),
            lambda x: x.clamp(max=1, min=0),
        ],
    ),
    "clamp_min": (
        IMAGE,
        "clamp %1 0",
        [lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0), lambda x: x.clamp_min(0)],
    ),
    "clamp_max": (IMAGE, "clamp %1 None 1", [lambda x: x.clamp(max=1), lambda x: x.clamp_max(1)]),
    "exp": (IMAGE, "exp %1", [torch.exp, Tensor.exp, lambda x: x.clone().exp_()]),
    "maximum": (IMAGE, "maximum %1 %1", [lambda x: torch.maximum(x, x), lambda x: x.maximum(x)]),
    "where": (IMAGE, "where %2 %1 0.0", [lambda x: torch.where(x > 0, x, 0.0), lambda x: x.where(x > 0, 0.0)]),
    "masked_fill": (
        IMAGE,
        "masked_fill %1 %2 0.0",
        [
            lambda x: x.masked_fill(x > 0, 0.0),
            lambda x: torch.masked_fill(x, x > 0, 0.0),
            lambda x: x.clone().masked_fill_(x > 0, value=0.0),
        ],
    ),
    "cat": (
        IMAGE,
        "cat (%1, %1) 1",
        [
            lambda x: torch.cat([x, x], 1),
            lambda x: torch.cat((x, x), dim=-3),
            lambda x: torch.concat([x, x], axis=1),
            lambda x: torch.hstack([x, x]),
            lambda x: torch.cat(tensors=[x, x], dim=1),
        ],
    ),
    "stack": (IMAGE, "stack (%1, %1) 4", [lambda x: torch.stack([x, x], -1), lambda x: torch.stack((x, x), dim=4)]),
    "flatten": (
        IMAGE,
        "flatten %1 1 3",
        [
            lambda x: x.flatten(1),
            lambda x: torch.flatten(x, 1),
            nn.Flatten(),
            lambda x: torch.flatten(x, start_dim=1),
            lambda x: x.view(x.size(0), -1),
            lambda x: x.view(x.shape[0], -1),
            lambda x: x.reshape(x.size()[0], -1),
            lambda x: x.view(-1, 192),
            lambda x: torch.reshape(x, (-1, 4 * 6 * 8)),
            lambda x: x.flatten(-3, -1),
            lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
            lambda x: x.flatten(start_dim=1, end_dim=-1),
        ],
    ),
    "flatten_maps": (
        IMAGE,
        "flatten %1 2 3",
        [
            lambda x: x.flatten(2),
            lambda x: x.view(x.size(0), x.size(1), -1),
            lambda x: x.view(*x.shape[:2], -1),
            lambda x: x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]),
        ],
    ),
    "flatten_batch": (TOKENS, "flatten %1 0 1", [lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, x.shape[-1])]),
    "unflatten": (
        TOKENS,
        "reshape %1 (-1, 5, 2, 4)",
        [
            lambda x: x.unflatten(2, (2, 4)),
            nn.Unflatten(2, (2, 4)),
            lambda x: x.view(x.size(0), 5, 2, 4),
            lambda x: x.view(-1, 5, 2, 4),
        ],
    ),
    "permute": (
        IMAGE,
        "permute %1 (0, 2, 3, 1)",
        [
            lambda x: x.permute(0, 2, 3, 1),
            lambda x: x.permute((0, 2, 3, 1)),
            lambda x: x.permute(0, -2, -1, 1),
            lambda x: torch.permute(x, (0, 2, 3, 1)),
            lambda x: x.permute(dims=(0, 2, 3, 1)),
            lambda x: x.movedim(1, -1),
            lambda x: torch.moveaxis(x, 1, 3),
        ],
    ),
    "transpose": (
        IMAGE,
        "permute %1 (0, 1, 3, 2)",
        [
            lambda x: x.transpose(2, 3),
            lambda x: x.transpose(-1, -2),
            lambda x: torch.transpose(x, 3, 2),
            lambda x: x.mT,
            lambda x: x.swapaxes(2, 3),
            lambda x: torch.transpose(x, dim0=-2, dim1=-1),
            lambda x: x.permute(0, 1, 3, 2),
        ],
    ),
    "chunk": (
        IMAGE,
        "chunk %2 2 1",
        [lambda x: x.chunk(2, 1)[0], lambda x: torch.chunk(x, 2, dim=-3)[0], lambda x: x.chunk(chunks=2, dim=1)[0]],
    ),
    "split": (
        IMAGE,
        "split %2 (1, 3) 1",
        [
            lambda x: x.split([1, 3], 1)[1],
            lambda x: torch.split(x, (1, 3), dim=-3)[1],
            lambda x: torch.split(x, split_size_or_sections=[1, 3], dim=1)[1],
            lambda x: x.split_with_sizes([1, 3], 1)[1],
        ],
    ),
    "split_even": (IMAGE, "split %2 2 1", [lambda x: x.split(2, 1)[0], lambda x: torch.split(x, 2, dim=1)[0]]),
    "unbind": (IMAGE, "unbind %2 1", [lambda x: x.unbind(1)[0], lambda x: torch.unbind(x, dim=-3)[0]]),
    "mean": (
        IMAGE,
        "mean %1 (2, 3)",
        [
            lambda x: x.mean((2, 3)),
            lambda x: x.mean([2, 3]),
            lambda x: torch.mean(x, dim=(-2, -1)),
            lambda x: x.mean(dim=(2, 3), keepdim=False),
            lambda x: x.mean(axis=(2, 3)),
        ],
    ),
    "mean_keep": (
        IMAGE,
        "mean %1 (1,) True",
        [
            lambda x: x.mean(1, True),
            lambda x: torch.mean(x, 1, keepdim=True),
            lambda x: x.mean(dim=-3, keepdim=True),
            lambda x: x.mean(keepdim=True, dim=[1]),
        ],
    ),
    "sum": (
        IMAGE,
        "sum %1 (3,)",
        [lambda x: x.sum(-1), lambda x: torch.sum(x, 3), lambda x: x.sum(dim=-1), lambda x: x.sum([3])],
    ),
    "amax": (IMAGE, "amax %1 (1,) True", [lambda x: x.amax(1, True), lambda x: torch.amax(x, dim=(-3,), keepdim=True)]),
    "max": (
        IMAGE,
        "max %2 1",
        [
            lambda x: x.max(1)[0],
            lambda x: torch.max(x, dim=-3)[0],
            lambda x: x.max(dim=1)[0],
            lambda x: x.max(1).values,
        ],
    ),
    "argmax": (IMAGE, "argmax %1 1", [lambda x: x.argmax(1), lambda x: torch.argmax(x, dim=-3)]),
    "std": (IMAGE, "std %1 (1,)", [lambda x: x.std(1), lambda x: torch.std(x, dim=-3), lambda x: x.std(dim=[1])]),
    "norm": (
        IMAGE,
        "linalg_vector_norm %1 2 (1,) True",
        [
            lambda x: x.norm(dim=1, keepdim=True),
            lambda x: torch.norm(x, 2, 1, True),
            lambda x: x.norm(2, -3, keepdim=True),
            lambda x: torch.linalg.vector_norm(x, 2, dim=1, keepdim=True),
        ],
    ),
    "zero_pad": (
        IMAGE,
        "pad %1 (1, 1, 2, 2) 'constant' 0.0",
        [
            lambda x: F.pad(x, (1, 1, 2, 2)),
            lambda x: F.pad(x, [1, 1, 2, 2], "constant", 0),
            nn.ZeroPad2d((1, 1, 2, 2)),
            lambda x: F.pad(x, pad=(1, 1, 2, 2), mode="constant", value=0.0),
            nn.ConstantPad2d((1, 1, 2, 2), 0.0),
        ],
    ),
    "value_pad": (
        SIGNAL,
        "pad %1 (1, 2) 'constant' -1.0",
        [lambda x: F.pad(x, (1, 2), value=-1), nn.ConstantPad1d((1, 2), -1)],
    ),
    "reflect_pad": (
        IMAGE,
        "pad %1 (1, 1, 1, 1) 'reflect'",
        [
            lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
            nn.ReflectionPad2d(1),
            lambda x: F.pad(x, (1,) * 4, mode="reflect"),
        ],
    ),
    "replicate_pad": (
        IMAGE,
        "pad %1 (1, 1, 1, 1) 'replicate'",
        [lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), nn.ReplicationPad2d(1)],
    ),
    "circular_pad": (
        IMAGE,
        "pad %1 (1, 1, 1, 1) 'circular'",
        [lambda x: F.pad(x, (1, 1, 1, 1), "circular"), nn.CircularPad2d(1)],
    ),
    "replicate_pad3d": (
        VOLUME,
        "pad %1 (1, 1, 1, 1, 1, 1) 'replicate'",
        [lambda x: F.pad(x, (1,) * 6, "replicate"), nn.ReplicationPad3d(1)],
    ),
    "nearest": (
        IMAGE,
        "interpolate %1 mode='nearest' scale_factor=(2.0, 2.0)",
        [
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, None, 2.0, "nearest"),
            nn.Upsample(scale_factor=2),
            nn.UpsamplingNearest2d(scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=(2, 2), mode="nearest"),
            lambda x: F.upsample(x, scale_factor=2),
        ],
    ),
    "bilinear": (
        IMAGE,
        "interpolate %1 align_corners=True mode='bilinear' size=(9, 9)",
        [
            lambda x: F.interpolate(x, 9, mode="bilinear", align_corners=True),
            nn.UpsamplingBilinear2d((9, 9)),
            nn.Upsample((9, 9), mode="bilinear", align_corners=True),
            lambda x: F.interpolate(x, size=[9, 9], mode="bilinear", align_corners=True),
        ],
    ),
    "bilinear_half": (
        IMAGE,
        "interpolate %1 mode='bilinear' size=(9, 9)",
        [
            lambda x: F.interpolate(x, 9, mode="bilinear"),
            nn.Upsample(9, mode="bilinear"),
            lambda x: F.interpolate(x, (9, 9), mode="bilinear", align_corners=False),
        ],
    ),
    "antialias": (
        IMAGE,
        "interpolate %1 antialias=True mode='bicubic' size=(3, 4)",
        [lambda x: F.interpolate(x, (3, 4), mode="bicubic", antialias=True)],
    ),
    "linear_scale": (
        SIGNAL,
        "interpolate %1 mode='linear' scale_factor=(2.0,)",
        [lambda x: F.interpolate(x, scale_factor=2, mode="linear"), nn.Upsample(scale_factor=2, mode="linear")],
    ),
    "trilinear": (
        VOLUME,
        "interpolate %1 mode='trilinear' scale_factor=(2.0, 2.0, 2.0)",
        [lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), nn.Upsample(scale_factor=2, mode="trilinear")],
    ),
    "select": (
        IMAGE,
        "getitem %1 (:, 1)",
        [
            lambda x: x[:, 1],
            lambda x: x.select(1, 1),
            lambda x: x[:, 1, ...],
            lambda x: x[:, 1, :, :],
            lambda x: torch.select(x, dim=1, index=1),
        ],
    ),
    "slice": (
        IMAGE,
        "getitem %1 (:, 1:3)",
        [
            lambda x: x[:, 1:3],
            lambda x: x.narrow(1, 1, 2),
            lambda x: x[:, 1:3, :, :],
            lambda x: x[:, 1:3, ...],
            lambda x: torch.narrow(x, 1, 1, 2),
            lambda x: x[..., 1:3, :, :],
        ],
    ),
    "stride_slice": (
        IMAGE,
        "getitem %1 (:, :, ::2)",
        [lambda x: x[:, :, ::2], lambda x: x[:, :, 0::2, :], lambda x: x[..., ::2, :]],
    ),
    "last": (TOKENS, "getitem %1 (:, -1)", [lambda x: x[:, -1], lambda x: x[:, -1, :], lambda x: x.select(1, -1)]),
    "all_but_last": (TOKENS, "getitem %1 (:, :-1)", [lambda x: x[:, :-1], lambda x: x[:, 0:-1]]),
    "two_axes": (
        IMAGE,
        "getitem %1 (:, 1:3)",
        [lambda x: x[:, 0, 1:3], lambda x: x[:, 0][:, 1:3], lambda x: x[:, 0, 1:3, :]],
    ),
    "unsqueeze": (
        TOKENS,
        "unsqueeze %1 1",
        [
            lambda x: x.unsqueeze(1),
            lambda x: x[:, None],
            lambda x: torch.unsqueeze(x, dim=-3),
            lambda x: x.unsqueeze(-3),
            lambda x: x[:, None, :, :],
        ],
    ),
    "squeeze": (
        (2, 4, 1),
        "squeeze %1 (2,)",
        [lambda x: x.squeeze(2), lambda x: x.squeeze(-1), lambda x: torch.squeeze(x, dim=2)],
    ),
    "gather": (
        TOKENS,
        "getitem %1 (:, :, %2)",
        [lambda x: x[:, :, torch.tensor([2, 0])], lambda x: x[..., torch.tensor([2, 0])]],
    ),
    "matmul": (
        TOKENS,
        "matmul %1 %2",
        [
            lambda x: x @ x.transpose(1, 2),
            lambda x: torch.bmm(x, x.transpose(1, 2)),
            lambda x: x.matmul(x.mT),
            lambda x: torch.matmul(x, x.permute(0, 2, 1)),
            lambda x: x.bmm(x.transpose(-1, -2)),
        ],
    ),
    "einsum": (
        TOKENS,
        "einsum 'bic,bjc->bij' %1 %1",
        [lambda x: torch.einsum("bic,bjc->bij", x, x), lambda x: torch.einsum("bic, bjc -> bij", [x, x])],
    ),
    "attention": (
        (2, 2, 5, 4),
        "scaled_dot_product_attention %1 %1 %1",
        [
            lambda x: F.scaled_dot_product_attention(x, x, x),
            lambda x: F.scaled_dot_product_attention(x, key=x, value=x, dropout_p=0.0),
        ],
    ),
    "expand": (
        (2, 1, 8),
        "expand %1 (-1, 5, -1)",
        [
            lambda x: x.expand(-1, 5, -1),
            lambda x: x.expand(x.shape[0], 5, 8),
            lambda x: x.expand((-1, 5, 8)),
            lambda x: torch.broadcast_to(x, (x.size(0), 5, 8)),
        ],
    ),
    "repeat": (
        TOKENS,
        "repeat %1 (1, 2, 1)",
        [lambda x: x.repeat(1, 2, 1), lambda x: x.tile((2, 1)), lambda x: torch.tile(x, (1, 2, 1))],
    ),
    "cast": (
        IMAGE,
        "to %1 torch.float16",
        [
            lambda x: x.half(),
            lambda x: x.to(torch.float16),
            lambda x: x.type(torch.float16),
            lambda x: x.to(dtype=torch.float16),
            lambda x: x.type(torch.HalfTensor),
        ],
    ),
    "roll": (
        IMAGE,
        "roll %1 (1, 2) (2, 3)",
        [lambda x: torch.roll(x, (1, 2), (2, 3)), lambda x: x.roll(shifts=(1, 2), dims=(2, 3))],
    ),
    "flip": (IMAGE, "flip %1 (3,)", [lambda x: x.flip(3), lambda x: torch.flip(x, [-1]), lambda x: x.flip(dims=(3,))]),
    "cumsum": (TOKENS, "cumsum %1 1", [lambda x: x.cumsum(1), lambda x: torch.cumsum(x, dim=-2)]),
    "topk": (TOKENS, "topk %2 2", [lambda x: x.topk(2, 2)[0], lambda x: torch.topk(x, k=2, dim=2)[0]]),
    "unfold": (
        IMAGE,
        "unfold %1 (3, 3) (1, 1) (1, 1) (1, 1)",
        [lambda x: F.unfold(x, 3, padding=1), nn.Unfold(3, padding=1), lambda x: F.unfold(x, (3, 3), 1, 1, 1)],
    ),
    "fold": (
        (2, 8, 12),
        "fold %1 (4, 5) (2, 2) (1, 1) (0, 0) (1, 1)",
        [lambda x: F.fold(x, (4, 5), 2), nn.Fold((4, 5), 2)],
    ),
    "windows": (SIGNAL, "unfold %1 2 3 2", [lambda x: x.unfold(2, 3, 2), lambda x: x.unfold(-1, 3, 2)]),
    "grid_sample": (
        IMAGE,
        "grid_sample %1 %3 'bilinear' 'zeros' False",
        [
            lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
            lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), "bilinear", "zeros", False),
        ],
    ),
    "softsign": (IMAGE, "truediv %1 %2", [nn.Softsign(), F.softsign, lambda x: x / (1 + x.abs())]),
    "tanhshrink": (IMAGE, "sub %1 %2", [nn.Tanhshrink(), F.tanhshrink]),
    "softmin": (IMAGE, "Softmax(dim=1) %1", [nn.Softmin(1), lambda x: F.softmin(x, 1)]),
    "normalize": (TOKENS, "truediv %1 %4", [F.normalize, lambda x: F.normalize(x, p=2.0, dim=1)]),
    "lrn": ((2, 6, 9), "truediv %1 %8", [nn.LocalResponseNorm(3), lambda x: F.local_response_norm(x, 3)]),
    "lp_pool": (IMAGE, "pow %1 0.5", [nn.LPPool2d(2, 2), lambda x: F.lp_pool2d(x, 2.0, 2)]),
    "zeros_like": (IMAGE, "zeros_like %1", [torch.zeros_like, lambda x: torch.zeros_like(x, dtype=x.dtype)]),
    "constant": (
        IMAGE,
        "add %1 %2",
        [lambda x: x + torch.arange(8) * 0.5, lambda x: x + torch.arange(0, 8, 1).mul(0.5)],
    ),
    "zeros": (
        IMAGE,
        "cat (%1, %3) 1",
        [
            lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 6, 8)], 1),
            lambda x: torch.cat([x, torch.zeros((x.size(0), 1, 6, 8), dtype=torch.float32)], 1),
            lambda x: torch.cat([x, x.new_zeros(x.size(0), 1, 6, 8)], 1),
        ],
    ),
}
"""Functions: the input, the line in canonical form, its tensors numbered as they are met, and how models write it."""


def assert_equal_values(program: Program, model: nn.Module, x: Tensor) -> None:
    """In float64, up to 1e-12 of the largest number."""
    with torch.no_grad():
        expected = model(x.clone())
    (given,) = program.outputs(x)
    assert given.dtype == expected.dtype
    if expected.is_floating_point():
        assert relative_maximum(given, expected) <= 1e-12
    else:
        assert torch.equal(given, expected)


def model_of(spelling: Spelling) -> nn.Module:
    return Written(spelling).eval()


CASES = (
    {name: (IMAGE, line, spellings) for name, (line, spellings) in ACTIVATIONS.items()}
    | {f"pool_{name}": case for name, case in POOLS.items()}
    | FUNCTIONS
)


def numbers(*shape: int) -> Tensor:
    """Values away from each other and from zero, so that rounding decides no comparison."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.05


def assert_one(forms: dict[str, list[str]], line: str) -> None:
    """All forms are the same, and one of their lines is the expected one."""
    first = next(iter(forms.values()))
    wanted = re.sub(r"%\d", "%", line)
    assert any(re.sub(r"%\d+", "%", entry.partition(" = ")[2]).startswith(wanted) for entry in first), first
    for what, lines in forms.items():
        assert lines == first, what


@pytest.mark.parametrize("name", CASES)
def test_every_spelling_comes_out_as_one(name: str) -> None:
    shape, line, spellings = CASES[name]
    x = numbers(*shape)
    forms = {}
    for number, spelling in enumerate(spellings):
        for road, program in roads(model_of(spelling), (x,), files=number == 0).items():
            forms[f"spelling {number}, {road}"] = form(program)
            assert program.batch_is_free, f"spelling {number}, {road}"
    assert_one(forms, line)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_model_in_float64(name: str) -> None:
    shape, _, spellings = CASES[name]
    x = numbers(*shape).double()
    for spelling in spellings:
        model = model_of(spelling).double()
        assert_equal_values(trace(model, x), model, x)


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3)


def norm(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A norm with statistics that matter."""
    layer: Any = kind(*args, **kwargs)
    generator = torch.Generator().manual_seed(2)
    for tensor in (*layer.parameters(), *(item for item in layer.buffers() if item.is_floating_point())):
        tensor.data.uniform_(0.5, 1.5, generator=generator)
    return layer


def batch_norm(m: Any, x: Tensor) -> Tensor:
    bn = m.bn
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, m.training, bn.momentum, bn.eps)


WEIGHTED: dict[str, tuple[tuple[int, ...], dict[str, Any], str, list[Callable[[Any, Tensor], Any]]]] = {
    "conv1d": (
        SIGNAL,
        {"conv": nn.Conv1d(4, 6, 3, 2, 1)},
        "Conv1d(4, 6, kernel_size=(3,), stride=(2,), padding=(1,)) 'conv'",
        [
            lambda m, x: m.conv(x),
            lambda m, x: F.conv1d(x, m.conv.weight, m.conv.bias, 2, 1),
            lambda m, x: m.conv.forward(x),
            lambda m, x: torch.conv1d(input=x, weight=m.conv.weight, bias=m.conv.bias, stride=(2,), padding=1),
        ],
    ),
    "conv2d": (
        IMAGE,
        {"conv": nn.Conv2d(4, 6, (3, 1), 2, (1, 0), groups=2)},
        "Conv2d(4, 6, kernel_size=(3, 1), stride=(2, 2), padding=(1, 0), groups=2) 'conv'",
        [
            lambda m, x: m.conv(x),
            lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, 2, (1, 0), 1, 2),
            lambda m, x: m.conv(input=x),
            lambda m, x: m.conv._conv_forward(x, m.conv.weight, m.conv.bias),
            lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, stride=2, padding=(1, 0), groups=2),
        ],
    ),
    "conv3d": (
        VOLUME,
        {"conv": nn.Conv3d(2, 3, 3, padding=1, bias=False)},
        "Conv3d(2, 3, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1), bias=False) 'conv'",
        [lambda m, x: m.conv(x), lambda m, x: F.conv3d(x, m.conv.weight, None, 1, 1)],
    ),
    "conv_same": (
        IMAGE,
        {"conv": nn.Conv2d(4, 4, 3, padding="same", dilation=2)},
        "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2)) 'conv'",
        [
            lambda m, x: m.conv(x),
            lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding="same", dilation=2),
            lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, 1, 2, 2),
        ],
    ),
    "conv_valid": (
        IMAGE,
        {"conv": nn.Conv2d(4, 4, 3, padding="valid")},
        "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1)) 'conv'",
        [lambda m, x: m.conv(x), lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias)],
    ),
    "conv_uneven_same": (
        IMAGE,
        {"conv": nn.Conv2d(4, 4, 2, padding="same")},
        "Conv2d(4, 4, kernel_size=(2, 2), stride=(1, 1), padding=same) 'conv'",
        [lambda m, x: m.conv(x)],
    ),
    "conv_circular": (
        IMAGE,
        {"conv": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")},
        "pad %0 (1, 1, 1, 1) 'circular'",
        [lambda m, x: m.conv(x), lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), m.conv.weight, m.conv.bias)],
    ),
    "transposed1d": (
        SIGNAL,
        {"up": nn.ConvTranspose1d(4, 2, 3, 2)},
        "ConvTranspose1d(4, 2, kernel_size=(3,), stride=(2,)) 'up'",
        [lambda m, x: m.up(x), lambda m, x: F.conv_transpose1d(x, m.up.weight, m.up.bias, 2)],
    ),
    "transposed2d": (
        IMAGE,
        {"up": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False)},
        "ConvTranspose2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), groups=2, "
        "bias=False) 'up'",
        [
            lambda m, x: m.up(x),
            lambda m, x: F.conv_transpose2d(x, m.up.weight, None, 2, 1, 1, 2),
            lambda m, x: m.up(x, output_size=(12, 16)),
        ],
    ),
    "transposed3d": (
        VOLUME,
        {"up": nn.ConvTranspose3d(2, 3, 2, 2)},
        "ConvTranspose3d(2, 3, kernel_size=(2, 2, 2), stride=(2, 2, 2)) 'up'",
        [lambda m, x: m.up(x), lambda m, x: F.conv_transpose3d(x, m.up.weight, m.up.bias, stride=2)],
    ),
    "linear": (
        TOKENS,
        {"fc": nn.Linear(8, 3)},
        "Linear(in_features=8, out_features=3, bias=True) 'fc'",
        [
            lambda m, x: m.fc(x),
            lambda m, x: F.linear(x, m.fc.weight, m.fc.bias),
            lambda m, x: F.linear(x, bias=m.fc.bias, weight=m.fc.weight),
        ],
    ),
    "linear_plain": (
        (2, 8),
        {"fc": nn.Linear(8, 3)},
        "Linear(in_features=8, out_features=3, bias=True) 'fc'",
        [
            lambda m, x: m.fc(x),
            lambda m, x: torch.addmm(m.fc.bias, x, m.fc.weight.t()),
            lambda m, x: torch.addmm(m.fc.bias, x, m.fc.weight.T),
        ],
    ),
    "linear_matmul": (
        TOKENS,
        {"fc": nn.Linear(8, 3, bias=False)},
        "Linear(in_features=8, out_features=3, bias=False) 'fc'",
        [
            lambda m, x: m.fc(x),
            lambda m, x: x @ m.fc.weight.t(),
            lambda m, x: torch.matmul(x, m.fc.weight.T),
            lambda m, x: x.matmul(m.fc.weight.transpose(0, 1)),
        ],
    ),
    "batch_norm1d": (
        SIGNAL,
        {"bn": norm(nn.BatchNorm1d, 4)},
        "BatchNorm1d(4, eps=1e-05",
        [lambda m, x: m.bn(x), batch_norm],
    ),
    "batch_norm2d": (
        IMAGE,
        {"bn": norm(nn.BatchNorm2d, 4, eps=1e-3)},
        "BatchNorm2d(4, eps=0.001",
        [lambda m, x: m.bn(x), batch_norm],
    ),
    "batch_norm3d": (
        VOLUME,
        {"bn": norm(nn.BatchNorm3d, 2, affine=False)},
        "BatchNorm3d(2, eps=1e-05, momentum=0.1, affine=False",
        [lambda m, x: m.bn(x), batch_norm],
    ),
    "sync_batch_norm": (IMAGE, {"bn": norm(nn.SyncBatchNorm, 4)}, "BatchNorm2d(4, eps=1e-05", [lambda m, x: m.bn(x)]),
    "batch_norm_of_batch": (
        IMAGE,
        {"bn": norm(nn.BatchNorm2d, 4, track_running_stats=False)},
        "BatchNorm2d(4, eps=1e-05",
        [lambda m, x: m.bn(x)],
    ),
    "instance_norm": (
        IMAGE,
        {"norm": norm(nn.InstanceNorm2d, 4, affine=True)},
        "InstanceNorm2d(4, eps=1e-05, momentum=0.1, affine=True",
        [lambda m, x: m.norm(x), lambda m, x: F.instance_norm(x, None, None, m.norm.weight, m.norm.bias)],
    ),
    "group_norm": (
        IMAGE,
        {"norm": norm(nn.GroupNorm, 2, 4)},
        "GroupNorm(2, 4",
        [lambda m, x: m.norm(x), lambda m, x: F.group_norm(x, 2, m.norm.weight, m.norm.bias)],
    ),
    "layer_norm": (
        TOKENS,
        {"norm": norm(nn.LayerNorm, 8)},
        "LayerNorm((8,)",
        [
            lambda m, x: m.norm(x),
            lambda m, x: F.layer_norm(x, (8,), m.norm.weight, m.norm.bias),
            lambda m, x: F.layer_norm(x, x.shape[-1:], m.norm.weight, m.norm.bias),
        ],
    ),
    "rms_norm": (
        TOKENS,
        {"norm": norm(nn.RMSNorm, 8, eps=1e-6)},
        "RMSNorm((8,), eps=1e-06",
        [lambda m, x: m.norm(x), lambda m, x: F.rms_norm(x, (8,), m.norm.weight, 1e-6)],
    ),
    "prelu": (
        IMAGE,
        {"act": nn.PReLU(4)},
        "PReLU(num_parameters=4) 'act'",
        [lambda m, x: m.act(x), lambda m, x: F.prelu(x, m.act.weight), lambda m, x: torch.prelu(x, m.act.weight)],
    ),
    "lstm": (
        TOKENS,
        {"rnn": nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True)},
        "LSTM(8, 3, num_layers=2, batch_first=True, bidirectional=True) 'rnn'",
        [
            lambda m, x: m.rnn(x)[0],
            lambda m, x: m.rnn(x, None)[0],
            lambda m, x: m.rnn(x, (torch.zeros(4, x.size(0), 3),) * 2)[0],
        ],
    ),
    "lstm_state": (
        TOKENS,
        {"rnn": nn.LSTM(8, 3, batch_first=True)},
        "LSTM(8, 3, batch_first=True) 'rnn'",
        [lambda m, x: m.rnn(x)[1][0][-1]],
    ),
    "gru": (
        TOKENS,
        {"rnn": nn.GRU(8, 3, batch_first=True)},
        "GRU(8, 3, batch_first=True) 'rnn'",
        [lambda m, x: m.rnn(x)[0], lambda m, x: m.rnn(x, torch.zeros(1, x.shape[0], 3))[0]],
    ),
    "rnn": (
        TOKENS,
        {"rnn": nn.RNN(8, 3, nonlinearity="relu", batch_first=True)},
        "RNN(8, 3, batch_first=True) 'rnn'",
        [lambda m, x: m.rnn(x)[0]],
    ),
    "own_weight": (
        IMAGE,
        {"kernel": w(6, 4, 3, 3)},
        "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), bias=False) 'kernel'",
        [lambda m, x: F.conv2d(x, m.kernel)],
    ),
    "standardised": (
        IMAGE,
        {"conv": nn.Conv2d(4, 6, 3)},
        "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1)) 'conv'",
        [
            lambda m, x: F.conv2d(x, m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True), m.conv.bias),
            lambda m, x: F.conv2d(x, m.conv.weight.sub(torch.mean(m.conv.weight, [1, 2, 3], True)), m.conv.bias),
        ],
    ),
    "blur": (
        IMAGE,
        {"kernel": torch.ones(4, 1, 2, 2) / 4},
        "Conv2d(4, 4, kernel_size=(2, 2), stride=(2, 2), groups=4, bias=False)",
        [
            lambda m, x: F.conv2d(x, m.kernel, stride=2, groups=4),
            lambda m, x: F.conv2d(x, m.kernel, None, 2, 0, 1, x.shape[1]),
        ],
    ),
    "scaled": (
        IMAGE,
        {"gamma": w(4, 1, 1)},
        "mul %0 %1",
        [lambda m, x: x * m.gamma, lambda m, x: m.gamma * x, lambda m, x: torch.mul(x, m.gamma)][:1],
    ),
    "class_token": (
        TOKENS,
        {"cls": w(1, 1, 8)},
        "cat (%2, %1) 1",
        [
            lambda m, x: torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1),
            lambda m, x: torch.cat((m.cls.expand(x.size(0), 1, 8), x), dim=1),
        ],
    ),
}
"""Layers with weights: the input, the model's own layers, the line in canonical form, and how models write it."""


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_spelling_of_a_layer_comes_out_as_one(name: str) -> None:
    shape, layers, line, spellings = WEIGHTED[name]
    x = numbers(*shape)
    forms = {}
    for number, spelling in enumerate(spellings):
        for road, program in roads(Written(spelling, **layers), (x,), files=number == 0).items():
            if name == "batch_norm_of_batch" and road != "symbolic":
                continue  # no other batch gives the same for one sample
            forms[f"spelling {number}, {road}"] = form(program)
            assert program.batch_is_free, f"spelling {number}, {road}"
    assert_one(forms, line)


@pytest.mark.parametrize("name", WEIGHTED)
def test_values_of_a_layer_are_those_of_the_model_in_float64(name: str) -> None:
    shape, layers, _, spellings = WEIGHTED[name]
    x = numbers(*shape).double()
    for spelling in spellings:
        model = Written(spelling, **layers).double().eval()
        if "zeros" in spelling.__code__.co_names:
            continue  # the zeros are float32
        assert_equal_values(trace(model, x), model, x)
    for layer in layers.values():
        layer.data = layer.data.float() if isinstance(layer, Tensor) else None
        layer.float() if isinstance(layer, nn.Module) else None
