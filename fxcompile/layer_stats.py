"""What a least-squares fit needs to know of a layer's data: streamed first and second moments.

A layer is a matrix product over patches (`fxcompile.patches`): y = W x + b, with x in R^F for each group. A quadratic
loss sees the data only through sums over rows: of x, x xᵀ, x yᵀ, y and y². `LayerStats` streams them, in float64 and
about the means, so memory does not grow with the number of samples, and nothing cancels when the means are large
beside the spread.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxcompile.errors import FitError, UsageError
from fxcompile.layers import is_finite
from fxcompile.patches import chunks, group_count, input_channels, output_channels, output_rows, weight_matrix, windows

CHUNK_BYTES = 64 * 2**20  # patches and outputs that are in memory as float64 at one time
BLOCK = 512  # the Gram matrix is summed in block rows of its lower triangle: 0.56 of the work at F = 4608


class Moments(NamedTuple):
    """Sums over rows, float64. Divide by `stats.rows` for expectations.

    Attributes:
        gram: sum of x xᵀ, [groups, F, F], exactly symmetric.
        cross: sum of x yᵀ, [groups, F, O/groups]; zeros where no outputs were given.
        energy: sum of y², [O]; likewise.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor


@dataclass(eq=False)
class LayerStats:
    """What a layer's inputs x, and the outputs y wanted of it, look like: streamed first and second moments.

    Kept about the means. A chunk of n rows with mean m joins N rows with mean M (Chan, Golub, LeVeque 1979) by

        scatter += Xᵀ X + n N / (n + N) (m - M)(m - M)ᵀ        X: the chunk's rows less m

    and the last term is one more row of X, sqrt(n N / (n + N)) (m - M): it costs nothing, and cross products and
    energies follow in the same way.

    Attributes:
        rows: patches seen: samples times output positions, or as many as `max_rows` let through.
        channels: input channels; each has features * groups / channels taps.
        mean_in: mean of x, [groups, F].
        mean_out: mean of y, [O].
        has_outputs: whether wanted outputs were given.
        precision: machine epsilon of the coarsest inputs seen; a spread below this part of the mean is rounding.
    """

    rows: int
    channels: int
    mean_in: Tensor = field(repr=False)
    mean_out: Tensor = field(repr=False)
    has_outputs: bool
    precision: float
    _scatter: Tensor = field(repr=False)
    _cross: Tensor = field(repr=False)
    _energy: Tensor = field(repr=False)
    _layer: nn.Module | None = field(default=None, repr=False)
    _lower_only: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, layer: nn.Module) -> LayerStats:
        """Empty statistics for a layer of `fxcompile.patches.FITTED`. Holds 8 F² bytes for each group."""
        groups, outputs = group_count(layer), output_channels(layer)
        features = weight_matrix(layer).shape[1]
        return cls(
            rows=0,
            channels=input_channels(layer),
            mean_in=_zeros(groups, features),
            mean_out=_zeros(outputs),
            has_outputs=False,
            precision=0.0,
            _scatter=_zeros(groups, features, features),
            _cross=_zeros(groups, features, outputs // groups),
            _energy=_zeros(outputs),
            _layer=layer,
        )

    @property
    def groups(self) -> int:
        """Number of groups, each with its own inputs and outputs."""
        return self.mean_in.shape[0]

    @property
    def features(self) -> int:
        """F: numbers in a patch, for each group."""
        return self.mean_in.shape[1]

    @property
    def outputs(self) -> int:
        """O: outputs of all groups together."""
        return self.mean_out.shape[0]

    def update(
        self, x: Tensor, y: Tensor, *, max_rows: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Adds a batch: inputs, and the outputs wanted for them.

        Args:
            x: the layer's input, [N, C, *positions], or [..., C] for a linear layer.
            y: of the shape of the layer's output on x. It need not be what the layer computes.
            max_rows: take only as many rows, one at random from each of `max_rows` equal stretches. 10 F rows
                in all are plenty.
            generator: draws them; one seeded by `rows` where none is given, so equal calls draw alike.

        Raises:
            FitError: NaN or infinity, shapes that do not fit, or inputs alone were added before.
        """
        self._update(x, y, max_rows, generator)

    def update_inputs(
        self, x: Tensor, *, max_rows: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Adds a batch of inputs alone, for uses that want no outputs, or `with_outputs_of` later."""
        self._update(x, None, max_rows, generator)

    @torch.no_grad()
    def _update(self, x: Tensor, y: Tensor | None, max_rows: int | None, generator: torch.Generator | None) -> None:
        if self._layer is None:
            raise FitError("statistics derived from others take no more data")
        if self.rows and self.has_outputs != (y is not None):
            raise FitError("some batches have wanted outputs and some have none", mend="give them for all or for none")
        check_finite(x, "inputs")
        view, leading = windows(self._layer, x.detach().cpu())
        wanted = None
        if y is not None:
            check_finite(y, "wanted outputs")
            wanted = output_rows(self._layer, y.detach().cpu())
            if wanted.shape != (*view.shape[:leading], self.outputs):
                raise FitError(f"wanted outputs of shape {list(y.shape)} do not fit inputs of shape {list(x.shape)}")
        if view.shape[:leading].numel() == 0:
            return
        self.has_outputs = y is not None
        self.precision = max(self.precision, torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps)
        limit = max(1, CHUNK_BYTES // (8 * (self.groups * self.features + self.outputs)))
        for chunk, outputs, axes in chunks(
            view, wanted, leading, limit, self._draw(view, leading, max_rows, generator)
        ):
            self._absorb(chunk, outputs, axes)

    def _draw(
        self, view: Tensor, leading: int, max_rows: int | None, generator: torch.Generator | None
    ) -> Tensor | None:
        """Numbers of the rows to take, ascending and distinct; None for all of them."""
        total = view.shape[:leading].numel()
        if max_rows is None or total <= max_rows:
            return None
        if max_rows < 1:
            raise UsageError(f"max_rows is {max_rows}", mend="choose at least 1")
        generator = generator or torch.Generator().manual_seed(self.rows)
        edges = torch.arange(max_rows + 1) * total // max_rows
        share = torch.rand(max_rows, dtype=torch.float64, generator=generator)
        return edges[:-1] + (share * edges.diff()).long()

    def _absorb(self, chunk: Tensor, wanted: Tensor | None, leading: int) -> None:
        rows = chunk.shape[:leading].numel()
        columns, mean_in = _centred_columns(chunk, leading, self.mean_in.flatten(), self.rows)
        x = columns.view(self.groups, self.features, -1)
        if self.features <= BLOCK:
            self._scatter.baddbmm_(x, x.mT)
        else:
            for gram, block in zip(self._scatter, x, strict=True):
                for start in range(0, self.features, BLOCK):
                    stop = min(start + BLOCK, self.features)
                    gram[start:stop, :stop].addmm_(block[start:stop], block[:stop].mT)
        self._lower_only = True
        if wanted is not None:
            columns, self.mean_out = _centred_columns(wanted, leading, self.mean_out, self.rows)
            self._cross.baddbmm_(x, columns.view(self.groups, -1, rows + 1).mT)
            self._energy += columns.square().sum(1)
        self.mean_in = mean_in.view_as(self.mean_in)
        self.rows += rows

    def merge(self, other: LayerStats) -> None:
        """Adds all that another collection for the same layer has seen."""
        mine, theirs = self._signature(), other._signature()
        if mine != theirs:
            raise FitError(f"statistics of different layers do not merge: {mine} and {theirs}")
        if not other.rows:
            return
        if self.rows and self.has_outputs != other.has_outputs:
            raise FitError("statistics with and without wanted outputs do not merge")
        total = self.rows + other.rows
        weight = self.rows * other.rows / total
        step_in, step_out = other.mean_in - self.mean_in, other.mean_out - self.mean_out
        gram, cross, energy = other.centred()
        self.centred()
        self._scatter += gram
        self._scatter.baddbmm_(step_in.unsqueeze(2), step_in.unsqueeze(1), alpha=weight)
        self._cross += cross + weight * step_in.unsqueeze(2) * step_out.view(self.groups, 1, -1)
        self._energy += energy + weight * step_out.square()
        self.mean_in = self.mean_in + step_in * (other.rows / total)
        self.mean_out = self.mean_out + step_out * (other.rows / total)
        self.has_outputs = other.has_outputs
        self.precision = max(self.precision, other.precision)
        self.rows = total

    def _signature(self) -> tuple[int, int, int, int]:
        return (self.groups, self.features, self.outputs, self.channels)

    def centred(self) -> Moments:
        """Sums about the means. These are the tensors it keeps, not copies: do not write to them."""
        if self._lower_only:
            for start in range(0, self.features, BLOCK):
                rows = self._scatter[:, start : start + BLOCK]
                self._scatter[:, :start, start : start + BLOCK] = rows[:, :, :start].mT
                square = rows[:, :, start : start + BLOCK]
                square.copy_(square.tril() + square.tril(-1).mT)
            self._lower_only = False
        return Moments(self._scatter, self._cross, self._energy)

    def raw(self) -> Moments:
        """Sums about zero: gram / rows is E[x xᵀ]."""
        gram, cross, energy = self.centred()
        gram = gram.baddbmm(self.mean_in.unsqueeze(2), self.mean_in.unsqueeze(1), alpha=self.rows)
        cross = cross + self.rows * self.mean_in.unsqueeze(2) * self.mean_out.view(self.groups, 1, -1)
        return Moments(gram, cross, energy + self.rows * self.mean_out.square())

    def relative_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """||W x + b - y|| / ||y|| over all rows and outputs, for a weight [O, ...] that flattens to [O, F].

        The square is (centred energy - W·C) + W·(S Wᵀ - C) + rows |W mean_in + b - mean_out|²: near a solution the
        middle term vanishes by itself. What remains cancels once, so errors below 1e-7 read as some value below 1e-7.
        """
        error = math.sqrt(self.squared_errors(weight, bias).sum().item())
        size = math.sqrt((self.centred().energy + self.rows * self.mean_out.square()).sum().item())
        if size == 0:
            return 0.0 if error == 0 else math.inf
        return error / size

    def squared_errors(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[O]: the sum over rows of (W x + b - y)² for each output, as in `relative_error`."""
        self.require_outputs()
        gram, cross, energy = self.centred()
        w = grouped(weight, self, self.outputs)
        drift = mean_output(w, bias, self) - self.mean_out
        fit = (w.mT * (gram @ w.mT - cross)).sum(1).flatten()
        rest = energy - (w.mT * cross).sum(1).flatten()
        return (fit + rest).clamp(min=0) + self.rows * drift.square()

    def with_outputs_of(self, weight: Tensor, bias: Tensor | None) -> LayerStats:
        """These inputs, towards the outputs W x + b of given weights: from the moments alone, no data needed."""
        gram, _, _ = self.centred()
        w = grouped(weight, self)
        cross = gram @ w.mT
        return dataclasses.replace(
            self,
            mean_out=mean_output(w, bias, self),
            has_outputs=True,
            _scatter=gram.clone(),
            _cross=cross,
            _energy=(w.mT * cross).sum(1).flatten(),
            _layer=None,
        )

    def select_inputs(self, channels: Sequence[int] | Tensor) -> LayerStats:
        """The statistics of a layer that is given only these input channels, in this order within each group.

        The wanted outputs stay. A group that keeps no channel goes, and its outputs with it; all others must keep
        equally many. For a linear layer after a flatten, pass the features that the channels became.
        """
        chosen = torch.as_tensor(channels, dtype=torch.long).flatten()
        each = self.channels // self.groups
        taps = self.features // each
        if chosen.numel() != chosen.unique().numel() or ((chosen < 0) | (chosen >= self.channels)).any():
            raise FitError(f"input channels must be distinct and between 0 and {self.channels - 1}")
        owner = chosen // each
        kept, counts = owner.unique(return_counts=True)
        if counts.numel() == 0 or (counts != counts[0]).any():
            raise FitError("every group that stays must keep equally many input channels, and one must stay")
        order = owner.argsort(stable=True)
        local = (chosen % each)[order].view(len(kept), -1, 1)
        features = (local * taps + torch.arange(taps)).flatten(1)  # [kept groups, F']
        return self._select(features, kept, len(chosen))

    def select_features(self, features: Sequence[int] | Tensor) -> LayerStats:
        """The statistics of a layer that is given only these numbers of each patch, the same in every group.

        That is no convolution's any more: its `channels` are these numbers, of all groups.
        """
        chosen = torch.as_tensor(features, dtype=torch.long).flatten()
        return self._select(chosen.expand(self.groups, -1), torch.arange(self.groups), len(chosen) * self.groups)

    def _select(self, features: Tensor, kept: Tensor, channels: int) -> LayerStats:
        """Of these groups the features [kept groups, F']."""
        gram, cross, energy = self.centred()
        rows = kept.unsqueeze(1)
        return dataclasses.replace(
            self,
            channels=channels,
            mean_in=self.mean_in[rows, features],
            mean_out=self.mean_out.view(self.groups, -1)[kept].flatten(),
            _scatter=gram[rows.unsqueeze(2), features.unsqueeze(2), features.unsqueeze(1)],
            _cross=cross[rows, features],
            _energy=energy.view(self.groups, -1)[kept].flatten(),
            _layer=None,
        )

    def require_outputs(self) -> None:
        """Raises `FitError` where there are no rows, or no outputs were given for them."""
        if not self.rows:
            raise FitError("there are no samples to fit to", mend="give calibration data")
        if not self.has_outputs:
            raise FitError("no wanted outputs were given with the inputs", mend="use update or with_outputs_of")


def grouped(weight: Tensor, stats: LayerStats, outputs: int | None = None) -> Tensor:
    """A weight [O, ...] that flattens to [O, F], as float64 [groups, O/groups, F].

    Raises:
        FitError: another number of features, or of outputs where that is given, or NaN or infinity.
    """
    check_finite(weight, "weights")
    if weight.dim() < 2 or weight.shape[1:].numel() != stats.features or weight.shape[0] % stats.groups:
        raise FitError(f"a weight of shape {list(weight.shape)} does not fit {stats.features} features per output")
    if outputs is not None and weight.shape[0] != outputs:
        raise FitError(f"a weight of shape {list(weight.shape)} does not fit {outputs} wanted outputs")
    return weight.detach().to("cpu", torch.float64).reshape(stats.groups, -1, stats.features)


def mean_output(weight: Tensor, bias: Tensor | None, stats: LayerStats) -> Tensor:
    """The mean of W x + b, [O], for a weight [groups, O/groups, F] and a bias [O]; None counts as zero."""
    mean: Tensor = (weight @ stats.mean_in.unsqueeze(2)).flatten()
    if bias is not None:
        check_finite(bias, "biases")
        mean += bias.detach().to("cpu", torch.float64)
    return mean


def check_finite(values: Tensor, name: str) -> None:
    """Raises `FitError`, naming what it is, if a tensor is complex or holds NaN or infinity."""
    if values.is_complex():
        raise FitError(f"the {name} are complex numbers", mend="fit real layers only")
    if not is_finite(values):
        wrong = values.numel() - int(values.isfinite().sum())
        raise FitError(f"{wrong} of {values.numel()} {name} are NaN or infinite", mend="check the data and the weights")


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _centred_columns(values: Tensor, leading: int, mean: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Rows as columns about their mean, and the column that joins them to `before` rows of another mean.

    Args:
        values: [*rows, *numbers], n rows in the first `leading` axes.
        mean: of the earlier rows, flat.
        before: how many earlier rows there were.

    Returns:
        Float64 columns [numbers, n + 1], and the mean of all rows.
    """
    rows, numbers = values.shape[:leading], values.shape[leading:]
    n = rows.numel()
    columns = torch.empty(numbers.numel(), n + 1, dtype=torch.float64)
    body = columns[:, :n]
    order = (*range(leading, values.dim()), *range(leading))
    body.view(*numbers, *rows).copy_(values.permute(order))
    own = body.mean(1)
    body -= own.unsqueeze(1)
    step = own - mean
    columns[:, n] = step * math.sqrt(before * n / (before + n))
    return columns, mean + step * (n / (before + n))
