"""`fxcompile show` and `fxcompile passes`: the right numbers under the right names, every option with its bounds."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from fxcompile.passes import FoldBatchNorm, StackKernels
from pydantic import Field
from torch import Tensor, nn

import fxcompile.registry
from fxcompile.contracts import Approximate
from fxcompile.describing import describe_all, describe_pass, describe_program
from fxcompile.registry import GROUP
from fxcompile.rewriting import Pass
from fxcompile.tracing import trace


class Net(nn.Module):
    """A convolution whose weight a second one shares, a batch norm, a residual and integer output beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.norm(self.stem(image)))
        y = y + self.second(self.first(y))
        scores = self.head(y.mean((2, 3)))
        return {"scores": scores, "best": scores.argmax(1)}


@pytest.fixture(scope="module")
def described():  # type: ignore[no-untyped-def]
    return describe_program(trace(Net().eval(), torch.randn(3, 2, 8, 8)))


def test_layers_have_shapes_and_costs_by_hand(described) -> None:  # type: ignore[no-untyped-def]
    layers = {item.name: item for item in described.layers}
    assert layers["stem"].kind == "Conv2d 2->4 3x3 /2"
    assert layers["stem"].shape == [3, 4, 4, 4]
    assert layers["stem"].cost.parameters == 4 * 2 * 9 + 4
    assert layers["stem"].cost.macs == 4 * 2 * 9 * 4 * 4
    assert layers["stem"].cost.bytes == 4 * (4 * 2 * 9 + 4)
    assert layers["norm"].cost.parameters == 8
    assert layers["norm"].cost.bytes == 4 * 16 + 8  # two buffers and a counter more
    assert layers["first"].kind == "Conv2d 4->4 3x3 groups=2"
    assert layers["second"].cost.macs == 4 * 2 * 9 * 4 * 4
    assert layers["head"].shape == [3, 3]
    assert layers["head"].cost.macs == 12
    assert layers["argmax"].dtype == "int64"


def test_totals_count_a_shared_tensor_once(described) -> None:  # type: ignore[no-untyped-def]
    assert described.total.parameters == 76 + 8 + 72 + 15
    assert described.total.macs == sum(item.cost.macs for item in described.layers)


def test_inputs_and_outputs_are_named(described) -> None:  # type: ignore[no-untyped-def]
    assert described.inputs == [{"name": "image", "shape": ["batch", 2, 8, 8], "dtype": "float32"}]
    assert described.outputs == ["scores", "best"]
    plain = json.loads(json.dumps(described.as_dict()))
    cost = {"parameters": 76, "macs": 1152, "bytes": 304}
    stem = {"name": "stem", "kind": "Conv2d 2->4 3x3 /2", "shape": [3, 4, 4, 4], "dtype": "float32", "cost": cost}
    assert plain["layers"][0] == stem


def test_the_table_of_a_program(described) -> None:  # type: ignore[no-untyped-def]
    lines = described.text(100).splitlines()
    assert lines[:4] == [
        "layer   kind                       output  params   MACs  bytes",
        "stem    Conv2d 2->4 3x3 /2        3x4x4x4      76  1.15k    304",
        "norm    BatchNorm2d               3x4x4x4       8            72",
        "relu    ReLU                      3x4x4x4",
    ]
    assert "argmax  argmax                    3 int64" in lines
    assert "input image: [batch, 2, 8, 8] float32" in lines
    assert "outputs: scores, best" in lines
    narrow = described.text(60).splitlines()
    assert max(map(len, narrow)) <= 60
    assert narrow[2:4] == ["stem    3x4x4x4      76  1.15k    304", "  Conv2d 2->4 3x3 /2"]


def test_a_fixed_batch_is_shown_and_explained() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 12).sum(0)

    described = describe_program(trace(Fixed(), torch.randn(2, 3, 4)))
    assert described.inputs[0]["shape"] == [2, 3, 4]
    assert "input x: [2, 3, 4] float32" in described.text()
    assert "note: the batch stays fixed: " in described.text()


class Everything(Pass):
    """One line of what.

    More lines.
    """

    name: ClassVar = "everything"
    contract: ClassVar = Approximate(exact_when="share=1")
    share: float = Field(0.5, gt=0, le=1, description="how much is kept")
    rounds: int | None = Field(None, ge=1, description="how often; by default once")
    fast: bool = Field(False, description="whether to hurry")


def test_every_option_has_its_values_bounds_and_default() -> None:
    described = describe_pass(Everything)
    assert described.contract == "approximate, exact when share=1"
    assert described.documentation == "One line of what.\n\nMore lines."
    options = {item.name: (item.values, item.default, item.description) for item in described.options}
    assert options["share"] == ("a number above 0 and of at most 1", "0.5", "how much is kept")
    assert options["rounds"] == ("a whole number of at least 1, or none", "none", "how often; by default once")
    assert options["fast"] == ("true or false", "false", "whether to hurry")
    assert set(options) == set(Everything.model_fields)
    assert describe_pass(Everything).source.endswith(f"Everything, {__file__}")


def test_options_of_the_pass_come_first_and_those_of_all_passes_after() -> None:
    lines = describe_pass(Everything).text(100).splitlines()
    assert lines[0] == "everything (approximate, exact when share=1)"
    own, shared = lines.index("options:"), lines.index("options of every pass:")
    assert lines[own + 1 : own + 3] == ["  share=0.5", "      a number above 0 and of at most 1: how much is kept"]
    assert [line.partition("=")[0].strip() for line in lines[shared:] if "=" in line] == [
        "only", "skip", "max_error", "min_saving"
    ]  # fmt: skip
    assert lines[-1].startswith("source: ")


def test_a_pass_without_options_of_its_own_has_no_empty_heading() -> None:
    own = set(FoldBatchNorm.model_fields) - set(Pass.model_fields)
    assert ("options:" in describe_pass(FoldBatchNorm).text(100).splitlines()) == bool(own)


def test_text_keeps_to_the_width() -> None:
    text = describe_pass(StackKernels).text(60)
    options = text.split("\noptions:", 1)[1].split("\nsource: ", 1)[0]
    assert max(map(len, options.splitlines())) <= 60
    assert max(map(len, describe_all().text(60).splitlines()[:-1])) <= 60


def test_a_package_that_does_not_import_hides_no_other_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dict(fxcompile.registry._entries())
    entries["broken"] = EntryPoint("broken", "surely_not_installed.passes:Broken", GROUP)
    monkeypatch.setattr(fxcompile.registry, "_entries", lambda: entries)
    listed = describe_all()
    assert {"fold-batchnorm", "eliminate-identity", "stack-kernels"} <= {item.name for item in listed.passes}
    assert list(listed.broken) == ["broken"]
    assert "surely_not_installed" in listed.broken["broken"]
    lines = listed.text(200).splitlines()
    assert any(line.startswith("broken ") and "reinstall the package" in line for line in lines)
    names = [item["name"] for item in json.loads(json.dumps(listed.as_dict()))["passes"]]
    assert names == [item.name for item in listed.passes]
