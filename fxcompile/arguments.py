"""What the command line's arguments mean, and which of them contradict each other; torch is not imported for it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fxcompile.errors import CalibrationError, UsageError
from fxcompile.filekinds import open_regular
from fxcompile.writing import check_folder, check_writable


def pipeline_text(passes: tuple[str, ...]) -> tuple[str, str]:
    """The pipeline's text, read from a file after an @, and what to call it in errors."""
    if len(passes) > 1:
        raise UsageError("--passes is given more than once", mend="write one list, name(option=value, ...), name, ...")
    text = passes[0] if passes else ""
    if not text.startswith("@"):
        return text, "--passes"
    if text == "@":
        raise UsageError("--passes @ names no file", mend="write --passes @FILE")
    path = Path(text[1:])
    with open_regular(path, UsageError, may_be_empty=True) as stream:
        content = stream.read(1_000_001)
    try:
        if len(content) > 1_000_000:
            raise UsageError("it is too long for a pipeline", place=str(path), mend="check --passes @FILE")
        return content.decode("utf-8"), str(path)
    except UnicodeDecodeError:
        raise UsageError("it is no text in UTF-8", place=str(path), mend="check --passes @FILE") from None


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Comma-separated numbers of an option."""
    if text is None:
        return None
    mend = "write it as 0.485,0.456,0.406"
    try:
        values = tuple(float(item) for item in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text} is no list of numbers", mend=mend) from None
    if not all(map(math.isfinite, values)):
        raise UsageError(f"{option} {text} is not finite", mend=mend)
    return values


def check_image_options(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, calibration: Path | None
) -> None:
    """Mean and deviation go with a folder of images, and nothing divides by zero."""
    if (mean is not None or std is not None) and (calibration is None or calibration.is_file()):
        raise UsageError(
            "--image-mean and --image-std are for a folder of images",
            mend="give one with --calibration" if calibration is None else "normalise the arrays instead",
        )
    if std is not None and min(std) <= 0:
        raise UsageError("--image-std must be positive", mend="give the deviations of the training data")


def dynamic_option(values: tuple[str, ...]) -> str | dict[str, tuple[int, ...]]:
    """`--dynamic` as the Python API takes it."""
    if not values:
        return "batch"
    if values in (("batch",), ("none",)):
        return values[0]
    axes: dict[str, tuple[int, ...]] = {}
    for value in values:
        if value in ("batch", "none"):
            raise UsageError(f"--dynamic {value} goes with no other --dynamic", mend="keep one of them")
        name, separator, text = value.partition("=")
        try:
            if not separator or not name:
                raise ValueError
            numbered = tuple(int(item) for item in text.split(","))
        except ValueError:
            raise UsageError(f"--dynamic {value} does not parse", mend="give batch, none, or NAME=AXIS,AXIS") from None
        if name in axes:
            raise UsageError(f"--dynamic names '{name}' twice", mend=f"write {name}=AXIS,AXIS once")
        axes[name] = numbered
    return axes


def check_files(
    output: Path | None,
    report: Path | None,
    dump_dir: Path | None,
    inputs: tuple[Path | None, ...],
) -> Path:
    """The output, after a look, before any work, at whether everything can be written and overwrites no input.

    Raises:
        UsageError: no output is named, or two files are one.
        WriteError: something cannot be written.
    """
    if output is None:
        raise UsageError("no output is named", mend="give one with -o OUT.onnx")
    if output.suffix != ".onnx":
        raise UsageError(f"the output '{output}' is no .onnx file", mend="name it OUT.onnx")
    if os.fsencode(output) != str(output).encode(errors="replace"):
        raise UsageError(f"the output's name '{output}' is no UTF-8, as ONNX wants it", mend="choose another name")
    check_written(output, inputs)
    check_written(report, inputs)
    if report is not None and report.resolve() == output.resolve():
        raise UsageError("--report and -o name the same file", mend="choose another file for the report")
    if dump_dir is not None:
        check_folder(dump_dir)
    return output


def check_written(path: Path | None, inputs: tuple[Path | None, ...]) -> None:
    """Raises WriteError where a file cannot be written, UsageError where it would overwrite an input."""
    if path is None:
        return
    check_writable(path)
    for other in inputs:
        if other is not None and is_same_file(path, other):
            raise UsageError(f"'{path}' is an input too", mend="choose another output")


def is_same_file(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file; a file that is missing is no other."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def check_calibration(calibration: Path | None) -> None:
    """Whether the calibration data can be opened at all, before the model is read."""
    if calibration is None or calibration.is_dir():
        return
    open_regular(calibration, CalibrationError).close()
