"""The command line. Imports torch only when there is work to do, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import difflib
import gc
import os
import sys
import warnings
from pathlib import Path

import click

from fxcompile.arguments import (
    check_calibration,
    check_files,
    check_image_options,
    dynamic_option,
    numbers,
    pipeline_text,
)
from fxcompile.cli_bisect import bisect_command
from fxcompile.cli_options import (
    calibration_options,
    model_options,
    passes_option,
    path_type,
    report_options,
    seed_option,
    with_options,
)
from fxcompile.errors import FxcompileError, UsageError, did_you_mean
from fxcompile.streams import abandon_stdout, fail, open_streams, print_results, write_results

OUT_OF_MEMORY = "out of memory; give fewer calibration samples or a smaller batch"


class _Group(click.Group):
    """Commands, and `compile` where none is named: `fxcompile model.pt2 -o model.onnx`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else "--help"
        if first not in (*self.commands, "-h", "--help", "--version"):
            is_option_or_file = first.startswith("-") or os.path.exists(first)
            near = [] if is_option_or_file else difflib.get_close_matches(first, self.commands, 1, 0.75)
            if near:
                raise UsageError(f"there is no file or command '{first}'", mend=f"did you mean '{near[0]}'?")
            args = ["compile", *args]
        return super().parse_args(ctx, args or ["--help"])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("fxcompile", "MODEL [OPTIONS] -o OUT.onnx")
        formatter.write_usage("fxcompile", "passes [NAME]", prefix="       ")
        formatter.write_usage("fxcompile", "show MODEL [OPTIONS]", prefix="       ")
        formatter.write_usage("fxcompile", "bisect MODEL [OPTIONS]", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of the main command, which is run where no command is named."""
        options = [*self.commands["compile"].params, *self.get_params(ctx)]
        shown = [item.get_help_record(ctx) for item in options if isinstance(item, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in shown if record is not None])
        self.format_commands(ctx, formatter)


def main(args: list[str] | None = None) -> None:
    """Entry point: errors are one sentence on stderr, exit code 1, or 2 for a wrong call."""
    # Threads of torch spin while they wait for each other: on a busy machine everything took up to ten times longer.
    # Not to spin at all takes half as long again on an idle one; so many turns are some microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    open_streams()
    try:
        check_current_folder()
        with warnings.catch_warnings():
            if not sys.warnoptions:  # torch and the model's code warn of what is no matter of the user's
                warnings.simplefilter("ignore")
            status = cli.main(args, prog_name="fxcompile", standalone_mode=False)
        sys.stdout.flush()
    except FxcompileError as error:
        fail(str(error), error.exit_code)
    except click.NoSuchOption as error:
        known = error.ctx.command.params if error.ctx is not None else []
        options = [name for item in known if isinstance(item, click.Option) for name in item.opts]
        fail(f"there is no option {error.option_name}; {did_you_mean(error.option_name, options)}", 2)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        mend = f"; see {context.command_path.removesuffix(' compile')} --help" if context is not None else ""
        fail(error.format_message().rstrip(".") + mend, error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except MemoryError:
        fail(OUT_OF_MEMORY, 1)
    except BrokenPipeError:  # `| head` has seen enough
        abandon_stdout()
        sys.exit(1)
    except OSError as error:
        abandon_stdout()
        fail(f"{error.filename or 'the system refuses'}: {error.strerror or error}", 1)
    except Exception as error:  # a bug of ours: still one sentence, and a way to see more
        if "can't allocate memory" in str(error):  # torch's own RuntimeError
            fail(OUT_OF_MEMORY, 1)
        if os.environ.get("FXCOMPILE_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {error}"[:300]
        fail(f"internal error, {what}; set FXCOMPILE_TRACEBACK=1 to see where, and report it", 1)
    sys.exit(status if isinstance(status, int) else 0)


def check_current_folder() -> None:
    """Raises UsageError where the current folder was removed: torch ends the process there without a word of why."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder does not exist any more", mend="go to another") from None


_compile_options = with_options(
    passes_option,
    click.option("-o", "--output", type=path_type, metavar="OUT.onnx", help="The ONNX file to write."),
    calibration_options,
    click.option("--verify", type=click.Choice(["raise", "rollback", "off"]), default="raise", show_default=True,
                 help="At a broken contract: stop, go on without that site or pass, or do not look."),
    click.option("--verify-examples", type=click.IntRange(1), metavar="N",
                 help="Inputs drawn for each check of the whole network and of the file  [default: 2 to 20, by cost]"),
    seed_option,
    click.option("--dynamic", metavar="batch|none|NAME=AXES", multiple=True,
                 help="Input dimensions that stay free, as image=0,2,3 once for each input  [default: batch]"),
    click.option("--opset", type=int, metavar="N", help="The ONNX opset, 18 to 24  [default: the exporter's]"),
    click.option("--pack", type=click.Choice(["auto", "off"]), default="auto", show_default=True,
                 help="Whether weights with many zeros are stored without them, and decoded when the file is loaded."),
    click.option("--dump-dir", type=path_type, metavar="DIR",
                 help="A folder for the graph after each pass, as readable text."),
    report_options,
)  # fmt: skip
_json_option = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fxcompile", prog_name="fxcompile")
def cli() -> None:
    """Make a convolutional network small and fast, check that it still computes the same, and write it as ONNX.

    \b
    fxcompile model.pt2 --passes "fold-batchnorm, stack-kernels(rank=0.5)" \\
              --calibration calib.npz -o model.onnx

    MODEL is a .pt2 (torch.export.save), a state dict with --model, or, with --allow-pickle, a pickled module.
    """


@cli.command("compile", short_help="What runs where no command is named.")
@model_options
@_compile_options
def compile_command(
    model: Path,
    factory: str | None,
    input_shapes: tuple[str, ...],
    allow_pickle: bool,
    passes: tuple[str, ...],
    output: Path | None,
    calibration: Path | None,
    image_mean: str | None,
    image_std: str | None,
    verify: str,
    verify_examples: int | None,
    seed: int,
    dynamic: tuple[str, ...],
    opset: int | None,
    pack: str,
    dump_dir: Path | None,
    as_json: bool,
    report_file: Path | None,
    quiet: bool,
) -> None:
    """Rewrite a model with passes, verify it and write it as ONNX. This is what runs where no command is named."""
    mean, std = numbers("--image-mean", image_mean), numbers("--image-std", image_std)
    check_image_options(mean, std, calibration)
    free = dynamic_option(dynamic)
    if verify == "off" and verify_examples is not None:
        raise UsageError("--verify off looks at no examples", mend="leave --verify-examples out")
    text, source = pipeline_text(passes)
    output = check_files(output, report_file, dump_dir, inputs=(model, calibration, Path(source)))
    check_calibration(calibration)

    with contextlib.redirect_stdout(sys.stderr):  # what the model's code prints is no report
        from fxcompile.calibration import read_calibration
        from fxcompile.emission import check_opset, with_dynamic
        from fxcompile.loading import load
        from fxcompile.manager import PassManager
        from fxcompile.pipeline import parse_pipeline
        from fxcompile.progress import ProgressBar

        parsed = parse_pipeline(text, source)
        check_opset(opset)
        with ProgressBar(quiet) as progress:
            program = load(model, factory, input_shapes, allow_pickle, progress)
            with_dynamic(program, free)
            data = None
            if calibration is not None:
                data = read_calibration(calibration, program.inputs, image_mean=mean, image_std=std)
            manager = PassManager(
                parsed,
                calibration=data,
                verify=verify,  # type: ignore[arg-type]
                verify_examples=verify_examples,
                seed=seed,
                dump_dir=dump_dir,
                progress=progress,
            )
            result = manager.run(program, model=model.name)
            del program
            gc.collect()  # the weights before the passes: writing needs memory for two copies of those after them
            progress("exporting, checking and writing", 0, 1)
            record = result.save_onnx(output, dynamic=free, opset=opset, verify=verify != "off", packed=pack != "off")
        if report_file is not None:
            write_results(record, report_file)
    if as_json or not quiet:
        print_results(record, as_json)


@cli.command("passes", short_help="The passes there are; one pass's options, contract and source.")
@click.argument("name", required=False)
@_json_option
def passes_command(name: str | None, as_json: bool) -> None:
    """What passes there are; with a NAME, that pass's options, contract and source."""
    from fxcompile.describing import describe_all, describe_pass
    from fxcompile.registry import find_pass

    described = describe_pass(find_pass(name)) if name is not None else describe_all()
    print_results(described, as_json)


@cli.command("show", short_help="A model's layers, shapes, parameters, multiply-accumulates, bytes.")
@model_options
@_json_option
def show_command(
    model: Path, factory: str | None, input_shapes: tuple[str, ...], allow_pickle: bool, as_json: bool
) -> None:
    """A model's layers, with shapes, parameters, multiply-accumulates and bytes."""
    with contextlib.redirect_stdout(sys.stderr):
        from fxcompile.describing import describe_program
        from fxcompile.loading import load
        from fxcompile.progress import ProgressBar

        with ProgressBar() as progress:
            described = describe_program(load(model, factory, input_shapes, allow_pickle, progress))
    print_results(described, as_json)


cli.add_command(bisect_command)
