"""The report as a person reads it, at two widths, and as a program reads it, by the schema that README.md documents."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest

from fxcompile.cost import Cost
from fxcompile.report import SCHEMA, FileReport, Outcome, PassReport, Report, SiteReport

NETWORK, FOLDED, STACKED = (
    Cost(1_700_000, 241_000_000, 6_900_000),
    Cost(1_690_000, 241_000_000, 6_860_000),
    Cost(691_000, 108_000_000, 2_760_000),
)


@pytest.fixture
def report() -> Report:
    """Two passes: sites kept, left and rolled back, one with a long name."""
    layer = Cost(1610, 230_000, 6430)
    folded = [
        SiteReport("features.denseblock1.denselayer12.conv1", "kept", before=Cost(96, 10_400, 456),
                   change="Conv2d 8->8 3x3 + BatchNorm2d -> Conv2d 8->8 3x3", after=Cost(80, 10_400, 320),
                   seconds=0.012),
        SiteReport("head", "left", reason="its output is used twice"),
    ]  # fmt: skip
    stacked = [
        SiteReport("conv", "kept", "Conv2d 8->8 5x5 -> Conv2d 8->4 3x3, Conv2d 4->8 3x3", 0.26641, before=layer,
                   after=Cost(584, 97_900, 2340), seconds=0.23),
        SiteReport("conv2", "rolled back", reason="it breaks its contract on zeros", before=layer, after=layer),
    ]  # fmt: skip
    return Report(
        "net.pt2", "fold-batchnorm, stack-kernels(rank=0.5)", 7, NETWORK, STACKED,
        passes=[
            PassReport("fold-batchnorm", "Exact", examples=20, before=NETWORK, after=FOLDED, seconds=0.43,
                       sites=folded),
            PassReport("stack-kernels(rank=0.5)", "Approximate", error=0.035612, measured_on="16 samples", examples=20,
                       before=FOLDED, after=STACKED, seconds=12.3, sites=stacked),
        ],
        notes=["the batch is fixed in the file"],
        seconds={"reading": 0.25, "tracing": 1.25, "passes": 12.73},
        file=FileReport("out/net.onnx", 2_800_123, 11, 20, 3.71e-7, 8, {"image": ["batch", 3, 8, 8]},
                        {"scores": ["batch", 10]}),
    )  # fmt: skip


def test_the_table_at_120_columns(report: Report) -> None:
    assert report.text(120).splitlines() == [
        "pass / site                                 error        params          MACs          bytes     s",
        "fold-batchnorm                                     1.7M > 1.69M          241M   6.9M > 6.86M  0.43",
        "  kept: exact, 1 of 2 sites rewritten, verified on 20 inputs",
        "  features.denseblock1.denselayer12.conv1               96 > 80         10.4k      456 > 320  0.01",
        "    Conv2d 8->8 3x3 + BatchNorm2d -> Conv2d 8->8 3x3",
        "  head  left: its output is used twice",
        "stack-kernels(rank=0.5)                    0.0356  1.69M > 691k   241M > 108M  6.86M > 2.76M    12",
        "  kept: approximate, 1 of 2 sites rewritten, verified on 20 inputs, error on 16 samples",
        "  conv                                      0.266   1.61k > 584  230k > 97.9k  6.43k > 2.34k  0.23",
        "    Conv2d 8->8 5x5 -> Conv2d 8->4 3x3, Conv2d 4->8 3x3",
        "  conv2                                                   1.61k          230k          6.43k  0.00",
        "    rolled back: it breaks its contract on zeros",
        "whole network                                       1.7M > 691k   241M > 108M   6.9M > 2.76M    14",
        "  59.4% fewer parameters, 55.2% fewer MACs, 60.0% fewer bytes",
        "time: reading 0.25 s, tracing 1.25 s, passes 13 s",
        "note: the batch is fixed in the file",
        "out/net.onnx: 2,800,123 bytes, 11 nodes, opset 20, ONNX Runtime agrees to 3.7e-07 on 8 inputs",
    ]


def test_at_80_columns_a_long_name_has_its_own_line(report: Report) -> None:
    lines = report.text(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[3:5] == [
        "  features.denseblock1.denselayer12.conv1",
        "                                      96 > 80         10.4k      456 > 320  0.01",
    ]
    assert lines[7] == "stack-kernels(rank=0.5)  0.0356  1.69M > 691k   241M > 108M  6.86M > 2.76M    12"
    assert lines[-2:] == [
        "out/net.onnx: 2,800,123 bytes, 11 nodes, opset 20, ONNX Runtime agrees to",
        "  3.7e-07 on 8 inputs",
    ]


def test_a_hundred_and_fifty_sites_take_two_lines_each(report: Report) -> None:
    site = report.passes[0].sites[0]
    report.passes[0].sites = [replace(site, name=f"layer{index}") for index in range(150)]
    lines = report.text(80).splitlines()
    assert [line.split()[0] for line in lines[3:303:2]] == [f"layer{index}" for index in range(150)]
    assert "kept: exact, 150 of 150 sites rewritten" in lines[2]


def test_what_was_not_done_is_not_claimed(report: Report) -> None:
    assert report.file is not None
    report.file.examples = 0
    report.passes[0].examples = 0
    report.after = report.before
    text = report.text(120)
    assert "opset 20, not held against ONNX Runtime" in text
    assert "  kept: exact, 1 of 2 sites rewritten\n" in text
    assert "fewer" not in text
    report.file = None
    report.passes = [
        PassReport("fold-batchnorm", "Exact", "left"),
        PassReport("stack-kernels", "Approximate", "rolled back", reason="it broke"),
    ]
    lines = report.text(120).splitlines()
    assert lines[1].startswith("fold-batchnorm  left: exact, no sites  ")
    assert lines[2].startswith("stack-kernels   rolled back: approximate, no sites, it broke  ")


def test_growth_is_called_growth(report: Report) -> None:
    report.after = Cost(1_870_000, 241_000_000, 6_900_000)
    assert "\n  10.0% more parameters\n" in report.text(120)


def test_json_holds_every_number(report: Report) -> None:
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["schema"] == SCHEMA == 1
    assert plain["before"] == {"parameters": 1_700_000, "macs": 241_000_000, "bytes": 6_900_000}
    assert plain["passes"][1]["sites"][0]["error"] == 0.26641
    assert plain["passes"][1]["sites"][0]["after"]["macs"] == 97_900
    assert plain["passes"][0]["error"] is None
    assert plain["file"]["inputs"] == {"image": ["batch", 3, 8, 8]}
    assert plain["seconds"] == {"reading": 0.25, "tracing": 1.25, "passes": 12.73}


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_json_is_valid_where_an_error_is_not_finite(report: Report, error: float) -> None:
    report.passes[1].error = report.passes[1].sites[0].error = error
    plain = report.as_dict()
    assert plain["passes"][1]["error"] is None
    assert plain["passes"][1]["sites"][0]["error"] is None
    json.dumps(plain, allow_nan=False)
    assert str(error) in report.text(120)


def documented() -> dict[str, set[str]]:
    """The schema's table of README.md: what is set in code in each row, by the keys that the row is about."""
    text = Path(__file__).parents[1].joinpath("README.md").read_text()
    section = re.split(r"\n##+ ", text.split("## The JSON report", 1)[1])[0]
    rows = [line.strip("|").split("|", 1) for line in section.splitlines() if line.startswith("| `")]
    return {key: set(re.findall(r"`([^`]+)`", says)) for keys, says in rows for key in re.findall(r"`([^`]+)`", keys)}


def test_the_documented_schema_is_what_is_written(report: Report) -> None:
    table = documented()
    assert table.keys() == {*report.as_dict(), "passes[].sites"}
    for key, kind in (("before", Cost), ("after", Cost), ("file", FileReport), ("passes", PassReport),
                      ("passes[].sites", SiteReport)):  # fmt: skip
        assert table[key] - set(get_args(Outcome)) == {field.name for field in fields(kind)}, key
    assert set(get_args(Outcome)) <= table["passes"]
