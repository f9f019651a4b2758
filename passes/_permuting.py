"""The mathematics of `group-shuffle(style=permuted)`: which channels stand together in a grouped convolution.

Channels are given to groups so that as much as can be of an energy E [O, C], what is between each output and each
input, falls within the groups. Given the groups of the inputs, what each output gains in each group is known, and to
share the outputs out equally is an assignment problem, as it is for the inputs, given the outputs. The two take turns.
Of exchanges only those of a pair between two groups are done, as long as they gain: none of three or more is tried.

Weights are split by the groups that the layer has, W [G, O, F] with F = C * taps, in float64; those of the grouped
convolution are [G, groups, O/groups, F/groups].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._stack_refining import cholesky_factor

_STARTS, _CHANNELS = (8, 64), 4096
"""Of the search, the fewest and the most, and in how many channels together: small layers have as many local optima."""


class Arrangement(NamedTuple):
    """Inputs [G, C] and outputs [G, O] in the order in which groups of equal size take them."""

    inputs: Tensor
    outputs: Tensor


def as_they_stand(weight: Tensor, taps: int) -> Arrangement:
    """The order that the channels of W [G, O, F] have."""
    groups, outputs, features = weight.shape
    return Arrangement(*(torch.arange(count).expand(groups, -1) for count in (features // taps, outputs)))


def searched(weight: Tensor, taps: int, groups: int, gram: Tensor | None = None) -> Arrangement:
    """That which keeps the most of the squared norm of W [G, O, F], or of what each input brings each output with S."""
    kernels = weight.unflatten(2, (-1, taps))
    if gram is None:
        energies = kernels.square().sum(3)
    else:
        own = gram.unflatten(2, (-1, taps)).unflatten(1, (-1, taps)).diagonal(dim1=1, dim2=3)  # [G, taps, taps, C]
        energies = torch.einsum("goct,gtuc,gocu->goc", kernels, own, kernels).clamp_min(0)
    generator = torch.Generator().manual_seed(0)
    found = [arranged(energy, groups, generator) for energy in energies]
    return Arrangement(*(torch.stack(orders) for orders in zip(*found, strict=True)))


def within(
    weight: Tensor, arrangement: Arrangement, taps: int, groups: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best weights [G, groups, O/groups, F/groups] within the groups of an arrangement, and them in W [G, O, F].

    In the Frobenius norm what W has there; with S [G, F, F], positive definite, V_G = W S[:, G] S[G, G]^-1.
    """
    owners = torch.arange(len(weight)).view(-1, 1, 1, 1)
    features = (arrangement.inputs.unsqueeze(2) * taps + torch.arange(taps)).flatten(1).unflatten(1, (groups, 1, -1))
    rows = arrangement.outputs.unflatten(1, (groups, -1, 1))
    place = owners, rows, features
    if gram is None:
        made = weight[place]
    else:
        factor = cholesky_factor(gram[owners, features.mT, features].flatten(0, 1), 1e-10)
        made = torch.cholesky_solve((weight @ gram)[place].mT.flatten(0, 1), factor).mT.unflatten(0, (-1, groups))
    dense = torch.zeros_like(weight)
    dense[place] = made
    return made, dense


def arranged(energy: Tensor, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [C] and outputs [O] in the order that keeps the most of an energy [O, C] of all that were tried.

    Starts at the order of the layer, at groups of like outputs around some drawn at random, and at random; inside of a
    group channels keep their order.
    """
    outputs, inputs = energy.shape
    tolerance, most = 1e-12 * float(energy.sum()), -1.0
    ins = torch.arange(inputs) * groups // inputs
    for start in range(min(max(_CHANNELS // (outputs + inputs), _STARTS[0]), _STARTS[1])):
        if start % 2:
            outs = alike(energy, groups, generator)
        else:
            outs = torch.randperm(outputs, generator=generator) if start else torch.arange(outputs)
            outs = outs * groups // outputs
        reached = -1.0
        while True:
            ins = assigned(energy.mT @ _shares(outs, groups), ins, tolerance)
            gain = energy @ _shares(ins, groups)
            outs = assigned(gain, outs, tolerance)
            before, reached = reached, float(gain.gather(1, outs.unsqueeze(1)).sum())
            if reached <= before + tolerance:
                break
        if reached > most + tolerance:
            best, most = _in_order(ins, outs), reached
    return best[0].argsort(stable=True), best[1].argsort(stable=True)


def alike(energy: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Groups [O] of outputs: around one after the other, drawn at random, those whose inputs are most like its own."""
    each = len(energy) // groups
    directions = energy / energy.norm(dim=1, keepdim=True).clamp_min(1e-300)
    likeness = directions @ directions.mT
    likeness.diagonal().fill_(2.0)
    owners, free = torch.zeros(len(energy), dtype=torch.long), torch.ones(len(energy), dtype=torch.bool)
    for seed in torch.randperm(len(energy), generator=generator).tolist():
        if free[seed]:
            taken = torch.where(free, likeness[seed], -1.0).topk(each).indices
            groups -= 1
            owners[taken], free[taken] = groups, False
    return owners


def assigned(gain: Tensor, owners: Tensor, tolerance: float) -> Tensor:
    """Groups [n] of n channels after all exchanges between two groups that gain more than the tolerance.

    Args:
        gain: of each channel in each group, [n, groups].
        owners: the groups to begin with. Their sizes stay.
    """
    owners, numbers, groups = owners.clone(), torch.arange(len(gain)), gain.shape[1]
    while True:
        moved = gain - gain[numbers, owners].unsqueeze(1)
        by_owner = moved.new_full((groups, groups), -torch.inf)
        by_owner.scatter_reduce_(0, owners.unsqueeze(1).expand_as(moved), moved, "amax")
        exchanged = by_owner + by_owner.mT
        if float(exchanged.max()) <= tolerance:
            return owners
        first, second = divmod(int(exchanged.argmax()), groups)
        there = int(torch.where(owners == first, moved[:, second], -torch.inf).argmax())
        back = int(torch.where(owners == second, moved[:, first], -torch.inf).argmax())
        owners[there], owners[back] = second, first


def _shares(owners: Tensor, groups: int) -> Tensor:
    return functional.one_hot(owners, groups).double()


def _in_order(ins: Tensor, outs: Tensor) -> tuple[Tensor, Tensor]:
    """The same groups, numbered by their first outputs."""
    groups = int(outs.max()) + 1
    first = torch.stack([(outs == group).nonzero()[0, 0] for group in range(groups)])
    rank = first.argsort().argsort()
    return rank[ins], rank[outs]
