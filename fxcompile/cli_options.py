"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that gives a command these options, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


path_type = click.Path(path_type=Path)

model_options = with_options(
    click.argument("model", metavar="MODEL", type=path_type),
    click.option("--model", "factory", metavar="MODULE:FACTORY",
                 help="The architecture, where MODEL holds a state dict (.pt, .pth, .safetensors): what makes it "
                 "without arguments, as package.module:name or path/to/file.py:name."),
    click.option("--input-shape", "input_shapes", metavar="[NAME=]SHAPE", multiple=True,
                 help="An input's shape, 1x3x224x224 or ids=1x20:int64; once for each input. A .pt2 needs none."),
    click.option("--allow-pickle", is_flag=True, help="Load pickled files, which can run any code they hold."),
)  # fmt: skip
passes_option = click.option(
    "--passes",
    metavar="TEXT",
    multiple=True,
    help="name(option=value, ...), name, ...; or @FILE. See fxcompile passes.",
)
calibration_options = with_options(
    click.option("--calibration", type=path_type, metavar="FILE",
                 help="Samples of the input: .npz, .npy, .pt, .safetensors, or a folder of images."),
    click.option("--image-mean", metavar="R,G,B", help="Mean by channel, subtracted from images scaled to 0..1."),
    click.option("--image-std", metavar="R,G,B", help="Deviation by channel, which images are divided by."),
)  # fmt: skip
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, metavar="N", show_default=True, help="Of everything random."
)
report_options = with_options(
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option(
        "--report", "report_file", type=path_type, metavar="FILE", help="Write the JSON report to a file too."
    ),
    click.option("--quiet", is_flag=True, help="Print no report, unless as JSON, and no progress."),
)
