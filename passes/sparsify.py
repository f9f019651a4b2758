"""Sets single weights to zero, and lets those that stay make up for them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from fxcompile.contracts import Approximate
from fxcompile.errors import FitError
from fxcompile.fitting import solve
from fxcompile.layer_stats import LayerStats, check_finite, grouped
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED, with_weights
from fxcompile.masks import SPARSE, keeping_zeros
from fxcompile.planning import Planning
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Replacement, Site, Skip
from fxcompile.sparse_layers import is_product, share_of_time

from ._chain_fitting import fit_statistics, mean_gram
from ._convolutions import float64, why_tied
from ._importance import share_of_larger
from ._sparse import Pattern, channels_last, mask_of, refined, thinned

TOLD = 8
"""Layers whose times are told."""

SOLVED_STEPS = 30
"""Of conjugate gradients, for the weights that magnitude leaves."""


class Sparsify(Pass):
    """W[O, C/g, *k]  =>  the same with a share of zeros

    Which weights go is told by their magnitude (Han et al. 2015), or with calibration data in rounds, by what each
    does to the outputs, those that stay being solved for after each (on the Gram matrix of the layer's inputs, in the
    order of the data, towards the original's features). The zeros stay zero in training: `result.module` has them as a
    mask, a parametrization of the weight. The file has them as one bit each, where that makes it smaller.

    `pattern=2:4` leaves two of each four channels that follow each other, as NVIDIA's sparse tensor cores want them;
    `block` lets so many go as one. Depthwise layers stay: they have few weights, and each is worth many.
    """

    name: ClassVar = "sparsify"
    contract: ClassVar = Approximate(exact_when="ratio=0, which leaves all weights")
    refit: ClassVar = False

    ratio: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero")
    scope: Literal["layer", "network"] = Field(
        "layer", description="whether that is a share of each layer's weights or of the whole network's"
    )
    error: float | None = Field(
        None,
        gt=0,
        description="instead of ratio: as many zeros in each layer as keep the relative error of its outputs, what "
        "layers before it have brought included, to this on the samples that are fitted to",
    )
    method: Literal["auto", "least-squares", "magnitude"] = Field(
        "auto", description="what tells which weights go; by default least-squares with calibration data"
    )
    pattern: str | None = Field(
        None, description="N:M, so many of each M channels that follow each other stay, 2:4 say"
    )
    execution: Literal["dense", "csr"] = Field(
        "dense",
        description="csr: in `result.module`, which does not train then, linear layers and 1x1 convolutions run by "
        "sparse products where these are faster here",
    )
    block: int = Field(1, ge=1, description="so many channels that follow each other go as one")

    _ratios: Mapping[str, float] | None = PrivateAttr(None)
    """By layer, the share of its weights that goes."""

    _sparse: frozenset[str] = PrivateAttr(frozenset())
    """Layers that sparse products are faster for."""

    @field_validator("pattern")
    @classmethod
    def _some_of_more(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            found = re.fullmatch(r"(\d+):(\d+)", pattern)
            if found is None or not 0 < int(found[1]) < int(found[2]):
                raise ValueError("write N:M with fewer N than M, 2:4 say")
        return pattern

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = self.model_fields_set
        if self.error is not None and {"ratio", "scope"} & given:
            raise ValueError("give ratio or error, not both")
        if self.pattern is not None and ({"ratio", "scope", "error"} & given or self.block > 1):
            raise ValueError("a pattern says what goes: give no ratio, error or block")
        return self

    @property
    def form(self) -> Pattern:
        """Which weights may go together."""
        if self.pattern is None:
            return Pattern(block=self.block)
        kept, of = map(int, self.pattern.split(":"))
        return Pattern(kept, of)

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions, transposed or not, and linear layers of several channels; with reasons, others of these."""
        tied, run = program.tied(), self.form.run
        for node, layer in program.layers(*CONVOLUTIONS, *TRANSPOSED, nn.Linear):
            channels = channels_of(layer)
            reason = why_tied(program, node, tied)
            if reason is None and channels == 1:
                reason = "it takes one channel, or one for each group: few weights, of which each is worth many"
            elif reason is None and channels % run:
                reason = f"its {channels} channels are no multiple of {run}"
            elif reason is None and self._ratios is not None and self._ratios.get(str(node.target)) == 0:
                reason = "all its weights are larger than what goes elsewhere"
            yield Skip.of(node, reason) if reason else Site.of(program, node)

    @property
    def measures_time(self) -> bool:
        """Whether it goes by time: then, which layers run by sparse products."""
        return self.execution == "csr"

    def plan(self, planning: Planning) -> Pass:
        """The same pass with the shares of a network-wide ratio; and with what sparse products are faster for."""
        planned = self if self.scope == "layer" or self._ratios is not None else self.shared_out(planning)
        if self.error is not None:
            return planned
        times = {
            site.name: share_of_time(next(planned.at(site, None, planned.ratio_of(site)))[0], site.input_shape)
            for site in planning.sites(planned)
            if is_product(site.layer) and site.input_shape and site.layer.weight.dtype in (torch.float32, torch.float64)
        }
        if times:
            planning.notes.append(self.times_told(times))
        if self.execution == "csr":
            planned = planned.model_copy()
            planned._sparse = frozenset(name for name, share in times.items() if share < 1)
        return planned

    def times_told(self, times: Mapping[str, float]) -> str:
        """In words, what sparse products take."""
        faster = sum(share < 1 for share in times.values())
        named = ", ".join(
            f"{name} {share:.2g}" for name, share in sorted(times.items(), key=lambda item: item[1])[:TOLD]
        )
        use = "result.module runs them so" if self.execution == "csr" else "execution=csr has result.module run them so"
        return (
            f"{self.name}: by torch's CSR products, {faster} of {len(times)} linear layers and 1x1 convolutions are "
            f"faster in Python with these zeros{f' ({use})' if faster else ''}; time as a multiple of the dense "
            f"product's: {named}"
        )

    def ratio_of(self, site: Site) -> float:
        """The share of a layer's weights that goes."""
        return self.ratio if self._ratios is None else self._ratios.get(site.name, 0.0)

    def shared_out(self, planning: Planning) -> Self:
        """The same pass with each layer's share of a network-wide ratio.

        Of all layers, the weights go first that are small beside the larger ones of their layer (Lee et al. 2021).
        """
        scores: dict[str, Tensor] = {}
        for site in planning.sites(self):
            scores[site.name] = share_of_larger(float64(site.layer)[0].flatten().square())
        planned = self.model_copy()
        if scores:
            all_scores = torch.cat(list(scores.values()))
            gone = round(self.ratio * len(all_scores))
            limit = all_scores.sort().values[gone - 1] if gone else torch.tensor(-1.0)
            planned._ratios = {name: float((own <= limit).double().mean()) for name, own in scores.items()}
        return planned

    def rewrite(self, site: Site) -> Replacement:
        """The last of the candidates, which knows the most."""
        return list(self.candidates(site))[-1]

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """By magnitude alone; and with data, by what each weight does to the outputs."""
        layer = site.layer
        check_finite(layer.weight, "weights")
        stats = None if isinstance(layer, TRANSPOSED) else fit_statistics(site)
        if self.error is not None:
            yield self.as_sparse_as(site, stats)
            return
        for layers in self.at(site, stats, self.ratio_of(site)):
            setattr(layers[0], SPARSE, site.name in self._sparse)
            yield layers

    def at(self, site: Site, stats: LayerStats | None, ratio: float) -> Iterator[list[nn.Module]]:
        """The layer with this share of zeros: by magnitude, and with data by what is nearest on them."""
        layer, (weight, bias) = site.layer, float64(site.layer)
        order = channels_last(weight) if not isinstance(layer, TRANSPOSED) else None
        if self.form.of:
            ratio = 1 - self.form.kept / self.form.of
        if order is None:  # [C, O / g, *k]: runs of channels lie on the first axis
            rows = weight.movedim(0, -1)
            stays = mask_of(rows.abs().contiguous(), ratio, self.form).movedim(-1, 0)
            yield [keeping_zeros(with_weights(layer, torch.where(stays, weight, 0.0), bias))]
            return
        back = order.argsort()
        flat = weight.flatten(1)[:, order]
        stays = mask_of(flat.abs(), ratio, self.form)
        plain = torch.where(stays, flat, 0.0)[:, back].reshape(weight.shape)
        if self.method != "least-squares" or stats is None:
            yield [keeping_zeros(with_weights(layer, plain, bias))]
        if stats is None:
            return
        target, gram, offset = wanted(stats, weight, bias)
        target, gram = target[:, :, order], gram[:, order][:, :, order]
        for stage in self.solved(grouped(flat, stats), grouped(stays.double(), stats).bool(), target, gram, ratio):
            found = stage[:, :, back].flatten(0, 1)
            yield [keeping_zeros(with_weights(layer, found.reshape(weight.shape), offset(found)))]

    def solved(self, weight: Tensor, stays: Tensor, target: Tensor, gram: Tensor, ratio: float) -> Iterator[Tensor]:
        """With the zeros of magnitude, and with those that the data choose."""
        if self.method != "least-squares":
            yield refined(weight * stays, stays, target, gram, SOLVED_STEPS)
        if self.method != "magnitude":
            yield thinned(target, gram, ratio, self.form)

    def as_sparse_as(self, site: Site, stats: LayerStats | None) -> Replacement:
        """The layer with as many zeros as keep its error on the rows that are fitted to, by halving the interval."""
        low, high = 0.0, 1.0
        best: Replacement | None = None
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            found = list(self.at(site, stats, ratio))[-1]
            assert self.error is not None
            if error_of(site, stats, found[0]) <= self.error:
                low, best = ratio, found
            else:
                high = ratio
        if best is None:
            raise FitError(f"no share of zeros keeps its error to {self.error:g}")
        return best


HALVINGS = 7
"""Of the interval in which a share of zeros is searched for."""


def channels_of(layer: Any) -> int:
    """Input channels of a group."""
    return int(layer.in_features) if isinstance(layer, nn.Linear) else int(layer.in_channels) // int(layer.groups)


def wanted(stats: LayerStats, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """W [g, o, F] that is nearest to the outputs wanted, S [g, F, F], and the bias that goes with another weight."""
    dense, _ = solve(stats, weight, bias)

    def offset(found: Tensor) -> Tensor | None:
        if bias is None:
            return None
        means = (grouped(found, stats) @ stats.mean_in.unsqueeze(2)).flatten()
        return stats.mean_out - means

    return grouped(dense, stats), mean_gram(stats, bias is not None), offset


def error_of(site: Site, stats: LayerStats | None, layer: Any) -> float:
    """The relative error of a layer's outputs; without data, that of its weights."""
    weight, bias = float64(layer)
    if stats is not None:
        return stats.relative_error(weight, bias)
    whole = float64(site.layer)[0]
    return math.sqrt(float((weight - whole).square().sum() / whole.square().sum().clamp_min(1e-300)))
