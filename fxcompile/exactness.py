"""Holds what is to take an exact site's place against the site itself, in float64, on drawn inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxcompile.comparing import Broken, compare
from fxcompile.contracts import tolerance
from fxcompile.drawing import Case, Inputs, cases, search
from fxcompile.errors import RewriteError
from fxcompile.footprint import enough_pixels
from fxcompile.program import InputSpec, dtype_of, shape_of
from fxcompile.regions import region_inputs, run_region, run_replacement
from fxcompile.rewriting import Pass, Replacement, Site


def broken_case(
    pass_: Pass, site: Site, drawn: Sequence[Case], batch_is_free: bool, seed: int
) -> tuple[Case, str] | None:
    """The smallest input found on which a site's replacement differs from the site, with the figures; or None.

    Both are made from weights that were cast to float64 before, where a wrong rewrite cannot hide behind rounding.

    Args:
        drawn: the inputs to compare on; what fails is shrunk.
        seed: of that search.

    Raises:
        RewriteError: the site takes something else than tensors.
    """
    check = SiteCheck(pass_, site, batch_is_free)
    for case in () if check.all_hold(drawn) else drawn:
        try:
            check(case)
        except Broken:
            return search(check, cases(check.inputs.kinds(), case.samples), 20, seed) or (case, "")
    return None


class SiteCheck:
    """A site and its replacement in float64, on inputs that are large enough to show all that either does."""

    def __init__(self, pass_: Pass, site: Site, batch_is_free: bool) -> None:
        self.site = site.double()
        with torch.no_grad():
            made = pass_.rewrite(self.site)
        self.replacement = made.double() if isinstance(made, nn.Module) else [layer.double() for layer in made]
        specs, examples = site_inputs(site, batch_is_free, map_size(site, self.replacement))
        self.inputs = Inputs(specs, examples)
        self.as_traced = Inputs([dataclasses.replace(spec, batch_axis=None) for spec in specs], examples)

    def __call__(self, case: Case) -> None:
        """Compare on one input.

        Raises:
            Broken: they differ.
        """
        tensors = in_double(self.inputs, case)
        with torch.no_grad():
            try:
                wanted = run_region(self.site, tensors)
            except RuntimeError:  # inside the network the first axis may hold more than samples
                tensors = in_double(self.as_traced, case)
                wanted = run_region(self.site, tensors)
            given = run_replacement(self.replacement, tensors)
        compare(given, wanted, tolerance(torch.float64), self.site.name)

    def all_hold(self, drawn: Sequence[Case]) -> bool:
        """Whether all cases hold as one batch, which costs less; if not, it is asked which of them does not."""
        if any(spec.batch_axis is None for spec in self.inputs.specs):
            return False
        parts = zip(*(in_double(self.inputs, case) for case in drawn), strict=True)
        tensors = [torch.cat(part) for part in parts]
        counts = [case.samples for case in drawn]
        try:
            with torch.no_grad():
                wanted, given = run_region(self.site, tensors), run_replacement(self.replacement, tensors)
            if wanted.shape[:1] != (sum(counts),) or given.shape != wanted.shape:
                return False
            for ours, theirs in zip(given.split(counts), wanted.split(counts), strict=True):
                compare(ours, theirs, tolerance(torch.float64), self.site.name)
        except (RuntimeError, Broken):
            return False
        return True


def in_double(inputs: Inputs, case: Case) -> list[Tensor]:
    """A case's tensors, what is floating in float64."""
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs.make(case)]


def map_size(site: Site, replacement: Replacement) -> tuple[int, ...]:
    """The size of a map, along its last axes, that shows all which a site and its replacement do; () for the whole."""
    layers = [replacement] if isinstance(replacement, nn.Module) else replacement
    old, new = enough_pixels(site.layers), enough_pixels(layers)
    if len(site.layers) != len(site.nodes) or old is None or new is None:
        return ()
    return tuple(map(max, old, new))


def site_inputs(
    site: Site, batch_is_free: bool, most: tuple[int, ...] = ()
) -> tuple[tuple[InputSpec, ...], tuple[Tensor, ...]]:
    """What a site takes, in the form that inputs are drawn for; of its maps only so many pixels along the last axes."""
    specs, examples = [], []
    for node in region_inputs(site.nodes):
        shape, dtype = shape_of(node), dtype_of(node)
        if shape is None or dtype is None:
            raise RewriteError("a site must take tensors", place=f"layer '{site.name}'")
        if most:
            shape = (*shape[: -len(most)], *map(min, shape[-len(most) :], most))
        specs.append(InputSpec(node.name, shape, dtype, batch_axis=0 if batch_is_free and shape else None))
        examples.append(torch.zeros(shape, dtype=dtype))
    return tuple(specs), tuple(examples)
