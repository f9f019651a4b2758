"""The rewrites that ship with fxcompile, imported as `fxcompile.passes`."""

from .eliminate_identity import EliminateIdentity
from .fold_batchnorm import FoldBatchNorm
from .split_kernels import SplitKernels
from .stack_kernels import StackKernels

__all__ = ["EliminateIdentity", "FoldBatchNorm", "SplitKernels", "StackKernels"]
