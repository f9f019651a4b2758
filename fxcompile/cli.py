"""The command line. Imports torch only when there is work to do, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fxcompile.errors import FxcompileError, UsageError, WriteError

if TYPE_CHECKING:
    from fxcompile.program import Program
    from fxcompile.report import Report


class _Group(click.Group):
    """Commands, and `compile` where none is named: `fxcompile model.pt2 -o model.onnx`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((arg for arg in args if not arg.startswith("-")), None)
        asks_group = args and args[0] in ("--help", "--version")
        if args and not asks_group and first not in self.commands:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("fxcompile", "MODEL [--passes TEXT] [-o OUT.onnx] [OPTIONS]")
        formatter.write_usage("fxcompile", "COMMAND [ARGS]...", prefix="or:    ")


def main(args: list[str] | None = None) -> None:
    """Entry point: errors are one sentence on stderr, exit code 1, or 2 for a wrong call."""
    try:
        status = cli.main(args, prog_name="fxcompile", standalone_mode=False)
    except FxcompileError as error:
        fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        fail("interrupted", 130)
    except click.ClickException as error:
        mend = f"; see {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        fail(error.format_message().rstrip(".") + mend, error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except MemoryError:
        fail("out of memory; give fewer calibration samples or a smaller batch", 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:  # a bug of ours: still one sentence, and a way to see more
        if os.environ.get("FXCOMPILE_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"internal error, {what}; set FXCOMPILE_TRACEBACK=1 to see where, and report it", 1)
    sys.exit(status if isinstance(status, int) else 0)


def fail(sentence: str, code: int) -> None:
    """Print one line and leave."""
    click.echo("fxcompile: " + " ".join(sentence.split()), err=True)
    sys.exit(code)


_model_options = [
    click.argument("model", metavar="MODEL", type=click.Path(path_type=Path)),
    click.option("--model", "factory", metavar="MODULE:FACTORY",
                 help="The architecture, where MODEL holds a state dict (.pt, .pth, .safetensors)."),
    click.option("--input-shape", "input_shapes", metavar="[NAME=]1x3x224x224", multiple=True,
                 help="An input's shape, once for each input; a .pt2 needs none."),
    click.option("--allow-pickle", is_flag=True, help="Load pickled files, which can run any code they hold."),
]  # fmt: skip


def model_options(command: Any) -> Any:
    """The arguments by which every command finds its model."""
    for option in reversed(_model_options):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fxcompile", prog_name="fxcompile")
def cli() -> None:
    """Make a convolutional network small and fast, check that it still computes the same, and write it as ONNX.

    \b
    fxcompile model.pt2 --passes "fold-batchnorm, stack-kernels(rank=0.5)" --calibration calib.npz -o model.onnx

    MODEL is a .pt2 (torch.export.save), a state dict with --model, or, with --allow-pickle, a pickled module.
    All options of that main command: fxcompile compile --help
    """


_compile_options = [
    click.option("--passes", "passes", metavar="TEXT", default="",
                 help="name(option=value, ...), name, ...; or @FILE. See `fxcompile passes`."),
    click.option("-o", "--output", "output", type=click.Path(path_type=Path), help="The ONNX file to write."),
    click.option("--calibration", type=click.Path(path_type=Path),
                 help="Samples of the input: .npz, .npy, .pt, .safetensors, or a folder of images."),
    click.option("--image-mean", metavar="R,G,B", help="Mean by channel, subtracted from images scaled to 0..1."),
    click.option("--image-std", metavar="R,G,B", help="Deviation by channel, which images are divided by."),
    click.option("--verify", type=click.Choice(["raise", "rollback", "off"]), default="raise", show_default=True,
                 help="What a broken contract does."),
    click.option("--verify-examples", type=click.IntRange(1),
                 help="Inputs drawn for each check  [default: 2 to 20, by cost]"),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True,
                 help="Of everything random."),
    click.option("--dynamic", "dynamic", metavar="batch|none|NAME=AXES", multiple=True,
                 help="Input dimensions that stay free: batch (default), none, or image=0,2,3."),
    click.option("--opset", type=int, help="The ONNX opset  [default: the exporter's]"),
    click.option("--dump-dir", type=click.Path(path_type=Path, file_okay=False),
                 help="A folder for the graph after each pass, as readable text."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("--report", "report_file", type=click.Path(path_type=Path),
                 help="Write the JSON report to a file too."),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
]  # fmt: skip


def compile_options(command: Any) -> Any:
    """The options of the main command."""
    for option in reversed(_compile_options):
        command = option(command)
    return command


@cli.command("compile")
@model_options
@compile_options
def compile_command(
    model: Path,
    factory: str | None,
    input_shapes: tuple[str, ...],
    allow_pickle: bool,
    passes: str,
    output: Path | None,
    calibration: Path | None,
    image_mean: str | None,
    image_std: str | None,
    verify: str,
    verify_examples: int | None,
    seed: int,
    dynamic: tuple[str, ...],
    opset: int | None,
    dump_dir: Path | None,
    as_json: bool,
    report_file: Path | None,
    quiet: bool,
) -> None:
    """Rewrite a model with passes, verify it and write it as ONNX. This is what runs where no command is named."""
    if output is None:
        raise UsageError("no output is named", mend="give one with -o OUT.onnx")
    if output.suffix != ".onnx":
        raise UsageError(f"the output '{output}' is no .onnx file", mend="name it OUT.onnx")
    mean, std = numbers("--image-mean", image_mean), numbers("--image-std", image_std)
    free = dynamic_option(dynamic)
    text = pipeline_text(passes)
    check_outputs(output, report_file, inputs=(model, calibration))

    import fxcompile.manager
    from fxcompile.calibration import read_calibration
    from fxcompile.pipeline import parse_pipeline
    from fxcompile.progress import Progress

    parsed = parse_pipeline(text)
    with Progress(quiet) as progress:
        progress("reading and tracing", 0, 1)
        program = load(model, factory, input_shapes, allow_pickle)
        data = None
        if calibration is not None:
            data = read_calibration(calibration, program.inputs, image_mean=mean, image_std=std)
        elif mean is not None or std is not None:
            raise UsageError("--image-mean and --image-std go with --calibration", mend="give a folder of images")
        manager = fxcompile.manager.PassManager(
            parsed,
            calibration=data,
            verify=verify,  # type: ignore[arg-type]
            verify_examples=verify_examples,
            seed=seed,
            dump_dir=dump_dir,
            progress=progress,
        )
        result = manager.run(program, model=model.name)
        progress("writing", 0, 1)
        record = result.save_onnx(output, dynamic=free, opset=opset, verify=verify != "off")
    publish_report(record, as_json, report_file, quiet)


@cli.command("passes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def passes_command(name: str | None, as_json: bool) -> None:
    """What passes there are; with a NAME, that pass's options, contract and source."""
    from fxcompile.describing import describe_all, describe_pass
    from fxcompile.registry import find_pass, pass_names

    described = [describe_pass(find_pass(name))] if name else [describe_pass(find_pass(item)) for item in pass_names()]
    if as_json:
        click.echo(json.dumps(described[0].as_dict() if name else [item.as_dict() for item in described], indent=2))
    else:
        click.echo(described[0].text() if name else describe_all(described))


@cli.command("show")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show_command(
    model: Path, factory: str | None, input_shapes: tuple[str, ...], allow_pickle: bool, as_json: bool
) -> None:
    """A model's layers, with shapes, parameters, multiply-accumulates and bytes."""
    from fxcompile.describing import describe_program

    described = describe_program(load(model, factory, input_shapes, allow_pickle))
    click.echo(json.dumps(described.as_dict(), indent=2) if as_json else described.text())


def load(model: Path, factory: str | None, input_shapes: tuple[str, ...], allow_pickle: bool) -> Program:
    """Read and trace the model that the arguments name."""
    from fxcompile.reading import read_model
    from fxcompile.shapes import example_inputs
    from fxcompile.timing import Stopwatch
    from fxcompile.tracing import trace

    watch = Stopwatch()
    with watch.stage("reading"):
        file = read_model(model, factory=factory, allow_pickle=allow_pickle)
    if file.exported is not None:
        if input_shapes:
            raise UsageError("a .pt2 brings its own input shapes", mend="leave --input-shape out")
        args, kwargs = file.example_inputs or ((), {})
        program = trace(file.exported, args, kwargs)
    else:
        assert file.module is not None
        args, kwargs = example_inputs(file.module, input_shapes)
        program = trace(file.module, args, kwargs)
    return replace(program, seconds={**watch.seconds, **program.seconds})


def pipeline_text(passes: str) -> str:
    """The pipeline's text, read from a file after an @."""
    if not passes.startswith("@"):
        return passes
    path = Path(passes[1:])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(
            f"the pipeline file cannot be read: {reason}", place=str(path), mend="check --passes @FILE"
        ) from None


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Comma-separated numbers of an option."""
    if text is None:
        return None
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text} is no list of numbers", mend="write it as 0.485,0.456,0.406") from None


def dynamic_option(values: tuple[str, ...]) -> str | dict[str, tuple[int, ...]]:
    """`--dynamic` as the Python API takes it."""
    if not values:
        return "batch"
    if values in (("batch",), ("none",)):
        return values[0]
    axes: dict[str, tuple[int, ...]] = {}
    for value in values:
        name, separator, text = value.partition("=")
        try:
            if not separator or not name:
                raise ValueError
            axes[name] = tuple(int(item) for item in text.split(","))
        except ValueError:
            raise UsageError(f"--dynamic {value} does not parse", mend="give batch, none, or NAME=AXIS,AXIS") from None
    return axes


def check_outputs(output: Path, report_file: Path | None, inputs: tuple[Path | None, ...]) -> None:
    """Refuse, before any work, outputs that cannot be written or that are inputs."""
    from fxcompile.files import check_writable

    for path in (output, report_file):
        if path is None:
            continue
        check_writable(path)
        for other in inputs:
            if other is not None and path.exists() and other.exists() and path.samefile(other):
                raise UsageError(f"'{path}' is an input too", mend="choose another output")
    if report_file is not None and report_file.absolute() == output.absolute():
        raise UsageError("--report and -o name the same file", mend="choose another file for the report")


def publish_report(record: Report, as_json: bool, report_file: Path | None, quiet: bool) -> None:
    """Print the report, and write it as JSON if asked."""
    text = json.dumps(record.as_dict(), indent=2, allow_nan=False, default=str)
    if report_file is not None:
        from fxcompile.files import write_atomically

        try:
            write_atomically(report_file, (text + "\n").encode())
        except OSError as error:
            raise WriteError(f"the report cannot be written: {error.strerror}", place=str(report_file)) from None
    if as_json:
        click.echo(text)
    elif not quiet:
        import shutil

        width = shutil.get_terminal_size((120, 0)).columns if sys.stdout.isatty() else 120
        click.echo(record.text(width))
