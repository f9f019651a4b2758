"""The mathematics of `group-shuffle`: a kernel as blocks, from groups of inputs to groups of outputs, of few channels.

Weights are split by the groups that the layer has, W [G, O, F] with F = C * taps, in float64. Block (b, a) of it goes
from the a-th of `ins` groups of inputs to the b-th of `outs` groups of outputs, by r channels of its own:

    inner [G, ins, outs, r, F/ins]      outer [G, outs, O/outs, ins, r]
    W[(b, o), (a, f)] ~ sum_r outer[b, o, a, r] inner[a, b, r, f]

`inner` is a grouped convolution and `outer` one over single pixels, with a shuffle between (Zhang et al. 2018); for one
group of outputs there is none. One group of each is a low-rank matrix, and an input to each group is the depthwise
separable convolution (Guo et al. 2018). Over single pixels these are the Monarch matrices of Dao et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, linalg

from fxcompile.fitting import leading_outputs

from ._separable import low_rank
from ._stack_refining import Coordinates, cholesky_factor, descend, squared_norm

_DAMPING = 1e-10
_FLOPS, _STEPS, _ROUND, _ENOUGH = 2e11, (12, 120), 30, 0.99


class Pair(NamedTuple):
    """Weights of the two layers, inner and outer."""

    inner: Tensor
    outer: Tensor


def by_group(weight: Tensor, groups: int) -> Tensor:
    """[G * O, C, *k] -> W [G, O, F]"""
    return weight.reshape(groups, len(weight) // groups, -1)


def blocks(weight: Tensor, ins: int, outs: int) -> Tensor:
    """W [G, O, F] -> [G, outs, ins, O/outs, F/ins]"""
    groups, outputs, features = weight.shape
    return weight.reshape(groups, outs, outputs // outs, ins, features // ins).transpose(2, 3)


def compose(pair: Pair) -> Tensor:
    """W [G, O, F] of a pair."""
    dense: Tensor = torch.einsum("gboar,gabrf->gboaf", pair.outer, pair.inner)
    return dense.flatten(3).flatten(1, 2)


def singular_values(weight: Tensor, ins: int, outs: int) -> Tensor:
    """[G, min]: of all blocks of a group together, the root of the sum of their squares, largest first."""
    values: Tensor = linalg.svdvals(blocks(weight, ins, outs))
    return values.square().sum((1, 2)).sqrt()


def lost(pair: Pair, weight: Tensor, gram: Tensor | None = None) -> float:
    """tr(E S Eᵀ) over all groups, E what the pair lacks of W; its squared norm where no S [G, F, F] is given."""
    return squared_norm(weight - compose(pair), gram)


def nearest_pair(weight: Tensor, ins: int, outs: int, width: int, gram: Tensor | None = None) -> Pair:
    """The pair with r = `width` channels in each block that comes nearest to W.

    Block by block the singular value decomposition, which is the best in the Frobenius norm. With S [G, F, F] of the
    inputs, positive definite, each block is reduced to the outputs that vary the most in its own part of S, and then
    `outer` is the best there is for all blocks together.
    """
    parts = blocks(weight, ins, outs)
    if gram is None:
        outer, inner = (side.unflatten(0, parts.shape[:3]) for side in low_rank(parts.flatten(0, 2), width))
        return Pair(inner.transpose(1, 2), outer.transpose(2, 3))
    own = _own(gram, ins)
    if parts.shape[4] < parts.shape[3]:  # fewer taps than outputs: the same from that side
        root = linalg.cholesky(own).unsqueeze(1)
        rows = linalg.eigh(((parts @ root).mT @ (parts @ root)).flatten(0, 2)).eigenvectors[..., -width:].mT
        inner = linalg.solve_triangular(root, rows.unflatten(0, parts.shape[:3]), upper=False, left=False)
    else:
        each = own.unsqueeze(1).expand(*parts.shape[:3], -1, -1).flatten(0, 2)
        inner = leading_outputs(parts.flatten(0, 2), each, width).mT.unflatten(0, parts.shape[:3]) @ parts
    inner = inner.transpose(1, 2)
    return balanced(Pair(inner, best_outer(inner, weight, gram)))


def best_outer(inner: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """The outer layer that is best given the inner one: X (D S Dᵀ) = W S Dᵀ, with D the inner one as a matrix."""
    groups, ins, outs, width, _ = inner.shape
    with_inputs, seen = _seen(inner, gram)
    wanted = with_inputs @ weight.unflatten(1, (outs, -1)).mT
    factor = cholesky_factor(seen.flatten(0, 1), _DAMPING)
    return torch.cholesky_solve(wanted.flatten(0, 1), factor).mT.reshape(groups, outs, -1, ins, width)


def refined(pair: Pair, weight: Tensor, gram: Tensor, steps: int | None = None) -> Pair:
    """A pair with a smaller tr(E S Eᵀ), S [G, F, F] positive definite, or as it was.

    Rounds of the exact solve for `outer` and of L-BFGS on both layers, each in coordinates in which its own Hessian is
    the identity: that of a block of `inner` is XᵀX times its part of S, with X its columns of `outer`. `steps` is by
    default what a fixed amount of arithmetic allows, between 12 and 120.
    """
    steps = steps or min(max(int(_FLOPS / _work(pair)), _STEPS[0]), _STEPS[1])
    objective, sizes = _objective(pair, weight, gram), (pair.inner.shape, pair.outer.shape)
    best, least = pair, lost(pair, weight, gram)
    for done in range(0, steps, _ROUND):
        moved = balanced(Pair(best.inner, best_outer(best.inner, weight, gram)))
        flat = descend(_flat(moved), _coordinates(moved, gram), objective, min(steps - done, _ROUND))
        found, before = _unflat(flat, sizes), least
        reached = lost(found, weight, gram)
        if reached < least:
            best, least = found, reached
        if not reached <= _ENOUGH * before:
            break
    return best


def _objective(like: Pair, weight: Tensor, gram: Tensor) -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]:
    """What `descend` lowers, as a share of tr(W S Wᵀ).

    tr(E S Eᵀ) = tr(W S Wᵀ) - 2 <X, W S Dᵀ> + <X, X D S Dᵀ> with X and D the two layers: D S costs a fraction of E S,
    since D has blocks. Gradients are written out for the same reason.
    """
    ins, outs = like.inner.shape[1:3]
    sizes = like.inner.shape, like.outer.shape
    seen_of_weight = weight @ gram
    total = (seen_of_weight * weight).sum().clamp_min(1e-300)
    parts = blocks(seen_of_weight, ins, outs)  # [G, outs, ins, O/outs, F/ins]

    def objective(flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        inner, outer = _unflat([item.detach() for item in flat], sizes)
        with_inputs, seen = _seen(inner, gram)
        columns = outer.flatten(3)
        cross = torch.einsum("gbaof,gabrf->gboar", parts, inner).flatten(3)
        down = columns @ seen - cross
        error = total + (columns * (down - cross)).sum()
        between = (columns.mT @ columns).unflatten(2, (ins, -1))
        inward = torch.einsum("gbarm,gbmaf->gabrf", between, with_inputs.unflatten(3, (ins, -1)))
        inward -= torch.einsum("gboar,gbaof->gabrf", outer, parts)
        surrogate = (flat[0] * inward.flatten(0, 2)).sum() + (flat[1] * down.flatten(0, 1)).sum()
        return error / total, 2 * surrogate / total

    return objective


def _work(pair: Pair) -> float:
    """Floating-point operations of a step, roughly."""
    ins, width = pair.inner.shape[1], pair.inner.shape[3]
    features, seen = ins * pair.inner.shape[4], ins * width
    return 2.0 * (pair.inner.numel() * (features + 2 * seen) + 2 * pair.outer.numel() * seen)


def balanced(pair: Pair) -> Pair:
    """The same pair with equal norms on both sides of each channel between."""
    into, out = pair.inner.norm(dim=4), pair.outer.norm(dim=2).permute(0, 2, 1, 3)
    scale = torch.where((into > 1e-150) & (out > 1e-150), (out / into.clamp_min(1e-150)).sqrt(), 1.0)
    return Pair(pair.inner * scale.unsqueeze(4), pair.outer / scale.transpose(1, 2).unsqueeze(2))


def _own(gram: Tensor, ins: int) -> Tensor:
    """[G, ins, F/ins, F/ins]: the part of S of each group of inputs."""
    each = gram.shape[1] // ins
    return gram.reshape(-1, ins, each, ins, each).diagonal(dim1=1, dim2=3).movedim(3, 1)


def _seen(inner: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of what each group of outputs sees with the inputs, [G, outs, ins * r, F], and with itself,
    [G, outs, ins * r, ins * r].
    """
    ins = inner.shape[1]
    with_inputs = torch.einsum("gabrf,gafx->gbarx", inner, gram.unflatten(1, (ins, -1))).flatten(2, 3)
    seen = torch.einsum("gbmaf,gabrf->gbmar", with_inputs.unflatten(3, (ins, -1)), inner).flatten(3)
    return with_inputs, (seen + seen.mT) / 2


def _flat(pair: Pair) -> list[Tensor]:
    """[blocks, r, F/ins] and [G * outs, O/outs, ins * r]"""
    return [pair.inner.flatten(0, 2), pair.outer.flatten(3).flatten(0, 1)]


def _unflat(flat: Sequence[Tensor], sizes: tuple[torch.Size, torch.Size]) -> Pair:
    return Pair(flat[0].reshape(sizes[0]), flat[1].reshape(sizes[1]))


def _coordinates(pair: Pair, gram: Tensor) -> list[Coordinates]:
    """Of both layers, for `descend`."""
    groups, ins, outs = pair.inner.shape[:3]
    columns = pair.outer.permute(0, 3, 1, 4, 2)  # [G, ins, outs, r, O/outs]
    own = cholesky_factor(_own(gram, ins).flatten(0, 1), _DAMPING).unflatten(0, (groups, ins, 1))
    inward = own.expand(-1, -1, outs, -1, -1).flatten(0, 2)
    inner, outer = _flat(pair)
    return [
        (cholesky_factor((columns @ columns.mT).flatten(0, 2), _DAMPING), inward, tuple(inner.shape)),
        (None, cholesky_factor(_seen(pair.inner, gram)[1].flatten(0, 1), _DAMPING), tuple(outer.shape)),
    ]
