"""A right pass to try to break, and wrong ones that are each one slip away from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from fxcompile.contracts import Approximate, Contract, Exact, Trained
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site, Skip


class ExplicitPadding(Pass):
    """conv(padding=(h, w))  =>  zero padding of h and w, conv without padding."""

    name: ClassVar[str] = "explicit-padding"
    contract: ClassVar[Contract] = Exact()
    idempotent: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions that pad by numbers."""
        for node, conv in program.layers(nn.Conv2d):
            if conv.padding == "same":
                yield Skip.of(node, "it pads unevenly")
            elif any(conv.padding):
                yield Site.of(program, node)

    def sides(self, conv: Any) -> tuple[int, int, int, int]:
        """Padding at left and right, top and bottom."""
        height, width = conv.padding
        return width, width, height, height

    def arguments(self, conv: Any) -> dict[str, Any]:
        """Options of the new convolution."""
        return {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}

    def rewrite(self, site: Site) -> list[nn.Module]:
        """Two layers, the second one over the weights of the old one."""
        conv = site.layer
        made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, device="meta", **self.arguments(conv))
        made.weight, made.bias = self.weight(conv.weight), conv.bias
        return [nn.ZeroPad2d(self.sides(conv)), made]

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        """The weight of the new convolution."""
        return held


class SwappedSides(ExplicitPadding):
    name: ClassVar[str] = "swapped-sides"

    def sides(self, conv: Any) -> tuple[int, int, int, int]:
        height, width = conv.padding
        return height, height, width, width


class OneSide(ExplicitPadding):
    """The same sum, and the same shapes."""

    name: ClassVar[str] = "one-side"

    def sides(self, conv: Any) -> tuple[int, int, int, int]:
        height, width = conv.padding
        return 2 * width, 0, 2 * height, 0


class ForgottenDilation(ExplicitPadding):
    name: ClassVar[str] = "forgotten-dilation"

    def arguments(self, conv: Any) -> dict[str, Any]:
        return {"stride": conv.stride, "groups": conv.groups}


class DroppedBias(ExplicitPadding):
    name: ClassVar[str] = "dropped-bias"

    def rewrite(self, site: Site) -> list[nn.Module]:
        pad, conv = super().rewrite(site)
        conv.bias = None  # type: ignore[assignment]
        return [pad, conv]


class RoundedWeight(ExplicitPadding):
    name: ClassVar[str] = "rounded-weight"

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(held.detach().float().double(), held.requires_grad)


class CopiedWeight(ExplicitPadding):
    """Right numbers, and a larger network where the weight is shared."""

    name: ClassVar[str] = "copied-weight"

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(held.detach().clone(), held.requires_grad)


class WrittenWeight(ExplicitPadding):
    """Right in its result, but the model is not what it was."""

    name: ClassVar[str] = "written-weight"

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        old = held.detach().clone()
        held.data.mul_(2)
        return nn.Parameter(old, held.requires_grad)


class FrozenWeight(ExplicitPadding):
    name: ClassVar[str] = "frozen-weight"

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(held.detach(), requires_grad=False)


class GlobalRandom(ExplicitPadding):
    name: ClassVar[str] = "global-random"

    def rewrite(self, site: Site) -> list[nn.Module]:
        torch.rand(1)
        return super().rewrite(site)


class NeverDone(ExplicitPadding):
    """Says that it is idempotent, and goes on and on."""

    name: ClassVar[str] = "never-done"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, conv in program.layers(nn.Conv2d):
            if conv.padding != "same":
                yield Site.of(program, node)


class DeafToSkip(ExplicitPadding):
    name: ClassVar[str] = "deaf-to-skip"

    def selects(self, name: str) -> bool:
        return True


class NoSites(ExplicitPadding):
    name: ClassVar[str] = "no-sites"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        return iter(())


class EditsElsewhere(ExplicitPadding):
    """Finds no site, and drops a layer on the way."""

    name: ClassVar[str] = "edits-elsewhere"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.ReLU):
            node.replace_all_uses_with(node.all_input_nodes[0])
            return
        yield from super().sites(program)


class Crashes(ExplicitPadding):
    name: ClassVar[str] = "crashes"

    def rewrite(self, site: Site) -> list[nn.Module]:
        if site.layer.groups > 1:
            raise KeyError("groups")
        return super().rewrite(site)


class OtherKernel(ExplicitPadding):
    """Computes right, and says that its kernel is another one."""

    name: ClassVar[str] = "other-kernel"

    def rewrite(self, site: Site) -> list[nn.Module]:
        pad, conv = super().rewrite(site)
        conv.kernel_size = (1, 1)  # type: ignore[assignment]
        return [pad, conv]


class Rescaled(ExplicitPadding):
    """Takes the norm of each filter out of the weight and puts it back, where it is not zero."""

    name: ClassVar[str] = "rescaled"

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        norm = weight.flatten(1).norm(dim=1)
        return torch.where(norm > 0, norm, torch.ones_like(norm))

    def rewrite(self, site: Site) -> list[nn.Module]:
        pad, conv = super().rewrite(site)
        norm = self.norm(conv.weight.detach()).view(-1, 1, 1, 1)
        conv.weight = nn.Parameter(conv.weight.detach() / norm * norm, conv.weight.requires_grad)
        return [pad, conv]

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        tied, calls = program.tied(), program.calls()
        for item in super().sites(program):
            if isinstance(item, Skip) or not (program.tied_to(item.node, tied) or len(calls[id(item.layer)]) > 1):
                yield item


class NeverTheSame(Rescaled):
    """Differs by rounding, from run to run."""

    name: ClassVar[str] = "never-the-same"
    count: ClassVar[list[int]] = [0]

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        self.count[0] += 1
        return super().norm(weight) * (1 + 0.1 * self.count[0])


class DeadFilter(Rescaled):
    """Divides by the norm of a filter that may be zero."""

    name: ClassVar[str] = "dead-filter"

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1).norm(dim=1)


class Louder(ExplicitPadding):
    """Approximate: off by one part in a hundred."""

    name: ClassVar[str] = "louder"
    contract: ClassVar[Contract] = Approximate()
    idempotent: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        tied = program.tied()
        for item in super().sites(program):
            if isinstance(item, Skip) or len(tied[id(item.layer.weight)]) == 1:
                yield item

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(held.detach() * 1.01, held.requires_grad)


class NotFinite(Louder):
    name: ClassVar[str] = "not-finite"

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(held.detach() * float("inf"), held.requires_grad)


class Steps(nn.Module):
    """Lets no gradient through to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The values in steps of a hundredth."""
        return torch.round(100 * x) / 100


class Forgetful(Louder):
    """Trained, and yet what comes before it learns nothing any more."""

    name: ClassVar[str] = "forgetful"
    contract: ClassVar[Contract] = Trained()

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [*super().rewrite(site), Steps()]
