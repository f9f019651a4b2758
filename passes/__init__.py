"""The rewrites that ship with fxcompile, imported as `fxcompile.passes`."""

from .absorb_shuffles import AbsorbShuffles
from .bottleneck import Bottleneck
from .eliminate_identity import EliminateIdentity
from .factorize import Factorize
from .fold_batchnorm import FoldBatchNorm
from .group_shuffle import GroupShuffle
from .head_to_conv import HeadToConv
from .prune_filters import PruneFilters
from .reduce_grid import ReduceGrid
from .remove_dead_channels import RemoveDeadChannels
from .sparsify import Sparsify
from .split_kernels import SplitKernels
from .stack_kernels import StackKernels

__all__ = [
    "AbsorbShuffles",
    "Bottleneck",
    "EliminateIdentity",
    "Factorize",
    "FoldBatchNorm",
    "GroupShuffle",
    "HeadToConv",
    "PruneFilters",
    "ReduceGrid",
    "RemoveDeadChannels",
    "Sparsify",
    "SplitKernels",
    "StackKernels",
]
