"""What a pass is: it finds sites in a program and says what shall stand in their place."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, fx, nn

from fxcompile.channel_graph import ChannelGraph, Group
from fxcompile.channel_labels import Role
from fxcompile.contracts import Contract
from fxcompile.fitting import LayerStats, collect, row_count
from fxcompile.labels import node_name
from fxcompile.layers import as_double, converted
from fxcompile.options import refusal
from fxcompile.program import Program, shape_of

if TYPE_CHECKING:
    from fxcompile.planning import Planning

Pairs = tuple[tuple[Tensor, Tensor], ...]
"""Batches of (what a site's input is now, what its output was in the original model)."""


@dataclass(frozen=True)
class Site:
    """Nodes of a program that a pass can replace as one.

    Attributes:
        nodes: the nodes, in the order of the data. They have one input from outside (the first node's first argument)
            unless the pass returns a module that takes several; the last one's value is what the replacement gives.
        layers: the layers that those nodes call, in order; functions have none.
        name: the layer's name under which the site is reported and the replacement is stored.
        pairs: calibration batches for fitting, where there are any.
        memo: what one draft computed that the next can use, by what tells them apart; whoever asks for drafts empties
            it after the last.
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[nn.Module, ...]
    name: str
    pairs: Pairs = field(default=(), repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    _collected: list[LayerStats] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, program: Program, *nodes: fx.Node, name: str | None = None) -> Site:
        """A site of these nodes, named after the first layer among them unless a name is given."""
        layers = tuple(layer for layer in map(program.layer, nodes) if layer is not None)
        named = next((str(node.target) for node in nodes if node.op == "call_module"), nodes[0].name)
        return cls(nodes, layers, name or named)

    @property
    def node(self) -> fx.Node:
        """The first node."""
        return self.nodes[0]

    @property
    def layer(self) -> Any:
        """The first layer."""
        return self.layers[0]

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Each node that calls a layer, with that layer."""
        return zip((node for node in self.nodes if node.op == "call_module"), self.layers, strict=True)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first node's input for the example inputs."""
        return shape_of(next(node.all_input_nodes[0] for node in self.nodes if node.all_input_nodes)) or ()

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the last node's output for the example inputs."""
        return shape_of(self.nodes[-1]) or ()

    def double(self) -> Site:
        """The same site with its layers in float64, where a wrong rewrite cannot hide behind rounding."""
        return replace(self, layers=tuple(converted(layer, as_double) for layer in self.layers))

    def with_pairs(self, pairs: Pairs) -> Site:
        """The same site with calibration batches to fit to."""
        return replace(self, pairs=pairs, _collected=[])

    def statistics(self) -> LayerStats:
        """The layer's statistics over the calibration batches, or as many rows of them as a fit needs: Gram matrix of
        its inputs, wanted outputs. Collected when first asked for.
        """
        if not self._collected:
            rows = sum(row_count(self.layer, y) for _, y in self.pairs)
            self._collected.append(collect(self.layer, self.pairs, rows))
        return self._collected[0]

    @property
    def collected(self) -> LayerStats | None:
        """The statistics, if they were asked for before."""
        return self._collected[0] if self._collected else None


@dataclass(frozen=True)
class Skip:
    """A place that a reader might expect to be rewritten, and the reason why it is not."""

    name: str
    reason: str

    @classmethod
    def of(cls, node: fx.Node, reason: str) -> Skip:
        """Skip a node, named after the layer it calls."""
        return cls(node_name(node), reason)


@dataclass(frozen=True)
class GroupSite(Site):
    """Channels that go together, as a site of a pass that takes some of them out.

    Attributes:
        group: of the channel graph.
    """

    group: Group = field(kw_only=True)

    @classmethod
    def of_group(cls, program: Program, group: Group) -> GroupSite:
        """The site of a group: the nodes that call what makes and takes its channels, in the order of the graph."""
        owners = {owner for owner, _ in group.holders}
        nodes = tuple(node for node in program.graph.nodes if str(node.target) in owners and node.op == "call_module")
        layers = tuple(layer for layer in map(program.layer, nodes) if layer is not None)
        return cls(nodes, layers, group.name, group=group)


@dataclass(frozen=True)
class Removal:
    """What is taken out at a site.

    Attributes:
        units: the numbers of the units of its group that go.
        changes: by the path of a stored tensor what is added to it, in the size that it has before; also to a bias that
            a layer does not have. What several sites change in one tensor adds up.
    """

    units: tuple[int, ...]
    changes: Mapping[str, Tensor] = field(default_factory=dict)


Replacement = nn.Module | Sequence[nn.Module]
"""What takes a site's place: layers that follow each other (none: the input itself), or one module with any inside."""


class Pass(BaseModel):
    """A rewrite. A subclass declares `name`, `contract` and its options as fields, and the two methods.

    The pass manager does the rest: snapshots, splicing, shapes, fitting, measuring, verification, rollback, records.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    contract: ClassVar[Contract]
    idempotent: ClassVar[bool] = False
    """Whether the pass leaves its own result as it is: run twice, it does no more than run once."""
    refit: ClassVar[bool] = True
    """Whether the last linear layer of a replacement is solved for on calibration data, and kept where it is nearer;
    not where weights must stay what the pass makes of them, such as rounded or sparse ones.
    """

    only: tuple[str, ...] = Field((), description="globs of layer names: sites elsewhere are left")
    skip: tuple[str, ...] = Field((), description="globs of layer names to leave as they are")
    max_error: float | None = Field(None, ge=0, description="largest relative output error that a site may cost")
    min_saving: float | None = Field(None, le=1, description="smallest share of its MACs that a site must save")

    def __init__(self, **options: Any) -> None:
        """Raises UsageError: there is no such option, or it cannot have that value."""
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise refusal(type(self), type(self).name, error) from error

    @field_validator("only", "skip", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def promise(self) -> Contract:
        """The contract under these options."""
        return self.contract

    @property
    def measures_time(self) -> bool:
        """Whether it goes by times that it measures: then the same seed need not give the same bits."""
        return False

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Every place to rewrite, in the order of the data; and with reasons, the near misses."""
        raise NotImplementedError

    def rewrite(self, site: Site) -> Replacement:
        """What takes the site's place, from the weights of `site.layers` and, if there are any, `site.pairs`."""
        raise NotImplementedError

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What may take the site's place, of about the same cost: the one that is nearest on held-out data does.

        Only passes that are not exact are asked; by default there is one, that of `rewrite`.
        """
        yield self.rewrite(site)

    def plan(self, planning: Planning) -> Pass:
        """Look at the whole program before the first site is rewritten: the pass that is run in the place of this one,
        with what it has decided on. By default itself.
        """
        return self

    def selects(self, *names: str) -> bool:
        """Whether `only` and `skip` let the pass touch layers that go together: `only` has one, `skip` has none."""

        def named(globs: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)

        return (not self.only or named(self.only)) and not named(self.skip)

    def too_little(self, saving: float | None) -> str | None:
        """Why a site that would save this share of its MACs is left, or None; with `min_saving=0`, one that saves none.

        Args:
            saving: less than 0 if it would cost more; None where there are no MACs that could be saved.
        """
        saved, wanted = saving or 0.0, self.min_saving
        if wanted is None or saved > max(wanted, 1e-9) or (saved >= wanted and (wanted != 0 or saving is None)):
            return None
        if saved < -1e-9:
            return f"it would cost {-saved:.0%} more MACs than it does, against min_saving={wanted:g}"
        share = f"{saved:.0%}" if saved > 1e-9 else "none"
        return f"it would save {share} of its MACs, {'below' if wanted > 0 else 'against'} min_saving={wanted:g}"

    def options(self, complete: bool = False) -> dict[str, Any]:
        """The options that were given, at their defaults or not; all of them if it is to be complete."""
        fields = type(self).model_fields
        given = [key for key in fields if complete or key in self.model_fields_set]
        return {key: getattr(self, key) for key in given}

    def __str__(self) -> str:
        from fxcompile.pipeline import format_pipeline

        return format_pipeline([self])

    def __repr__(self) -> str:
        return str(self)


class ChannelPass(Pass):
    """A pass that takes channels out. Its sites are groups of channels; it says which of them go.

    The pass manager takes them out of all layers at once, and then, unless the pass is exact or its `refit` is off,
    solves for the weights of the layers that took them, in the order of the data, towards the original's features.
    """

    until_done: ClassVar[bool] = False
    """Whether it is run again as long as it finds anything: what goes may leave more that can."""

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each group of channels; with reasons, those that cannot go."""
        for group in ChannelGraph.of(program).groups:
            yield Skip(group.name, group.reason) if group.reason else GroupSite.of_group(program, group)

    def selects_group(self, group: Group) -> bool:
        """Whether `only` and `skip` let the pass touch a group, by any of the layers that make its channels."""
        return self.selects(group.name, *(member.owner for member in group.of(Role.OUTPUT)))

    @property
    def repairs(self) -> bool:
        """Whether the layers that took what is gone are fitted."""
        return self.refit

    def rounds(self) -> list[ChannelPass]:
        """The passes that are run one after the other in its place: itself."""
        return [self]

    def removal(self, site: GroupSite) -> Removal:
        """What goes at a site."""
        raise NotImplementedError
