"""`fxcompile bisect`: which pass, which site and which layer cost the error of a compiled model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fxcompile.arguments import check_calibration, check_image_options, check_written, numbers, pipeline_text
from fxcompile.cli_options import (
    calibration_options,
    model_options,
    passes_option,
    path_type,
    report_options,
    seed_option,
    with_options,
)
from fxcompile.streams import print_results, write_results

if TYPE_CHECKING:
    from fxcompile.calibration import Calibration

_bisect_options = with_options(
    passes_option,
    calibration_options,
    click.option("--case", type=path_type, metavar="FILE",
                 help="An input that went wrong, to measure on instead of held-out calibration data."),
    click.option("--verify", type=click.Choice(["keep", "rollback", "off"]), default="keep", show_default=True,
                 help="At a broken contract: report it and measure what broke it, undo that, or do not look."),
    click.option("--again", type=click.IntRange(0), default=8, metavar="N", show_default=True,
                 help="Sites to compile again without and by themselves, those that seem to cost the most."),
    click.option("--samples", type=click.IntRange(1), default=64, metavar="N", show_default=True,
                 help="Held-out samples to measure on, at most."),
    click.option("--no-file", is_flag=True, help="Do not emit the ONNX file and measure it in ONNX Runtime."),
    seed_option,
    report_options,
)  # fmt: skip


@click.command("bisect", short_help="The pass, the site and the layer that cost a compiled model's error.")
@model_options
@_bisect_options
def bisect_command(
    model: Path,
    factory: str | None,
    input_shapes: tuple[str, ...],
    allow_pickle: bool,
    passes: tuple[str, ...],
    calibration: Path | None,
    image_mean: str | None,
    image_std: str | None,
    case: Path | None,
    verify: str,
    again: int,
    samples: int,
    no_file: bool,
    seed: int,
    as_json: bool,
    report_file: Path | None,
    quiet: bool,
) -> None:
    """Find, by measurement, which pass and which site of it cost the error of a compiled model, and at which layer.

    \b
    fxcompile bisect model.pt2 --passes "fold-batchnorm, stack-kernels(rank=0.2)" --calibration calib.npz
    """
    mean, std = numbers("--image-mean", image_mean), numbers("--image-std", image_std)
    folder = next((path for path in (calibration, case) if path is not None and path.is_dir()), calibration)
    check_image_options(mean, std, folder)
    text, source = pipeline_text(passes)
    check_written(report_file, inputs=(model, calibration, case, Path(source)))
    check_calibration(calibration)
    check_calibration(case)

    with contextlib.redirect_stdout(sys.stderr):  # what the model's code prints is no report
        from fxcompile.bisecting import bisect
        from fxcompile.calibration import read_calibration
        from fxcompile.loading import load
        from fxcompile.pipeline import parse_pipeline
        from fxcompile.progress import ProgressBar

        parsed = parse_pipeline(text, source)
        with ProgressBar(quiet) as progress:
            program = load(model, factory, input_shapes, allow_pickle, progress)

            def samples_in(path: Path | None) -> Calibration | None:
                if path is None:
                    return None
                normal = {"image_mean": mean, "image_std": std} if path.is_dir() else {}
                return read_calibration(path, program.inputs, **normal)

            diagnosis = bisect(
                program,
                parsed,
                calibration=samples_in(calibration),
                case=samples_in(case),
                verify=verify,  # type: ignore[arg-type]
                emit=not no_file,
                again=again,
                samples=samples,
                seed=seed,
                model=model.name,
                progress=progress,
            )
        if report_file is not None:
            write_results(diagnosis, report_file)
    if as_json or not quiet:
        print_results(diagnosis, as_json)
