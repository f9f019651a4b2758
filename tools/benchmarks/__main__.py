"""`python -m benchmarks [SUBJECT]`: the command line of `tools/bench`."""

from __future__ import annotations

import click

from benchmarks.compiler import compiler


class _Group(click.Group):
    """Subjects, and `compiler` where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks_group = bool(args) and args[0] in ("-h", "--help")
        if not asks_group and (not args or args[0].startswith("-")):
            args = ["compiler", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def bench() -> None:
    """Measure fxcompile; exits with 1 if a goal is missed."""


bench.add_command(compiler)

if __name__ == "__main__":
    bench(prog_name="tools/bench")
