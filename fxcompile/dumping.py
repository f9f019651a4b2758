"""Writes the graph after each pass as readable text: `--dump-dir`."""

from __future__ import annotations

import re
from pathlib import Path

from fxcompile.errors import WriteError
from fxcompile.labels import describe_layer, function_name
from fxcompile.program import ORIGIN, Program, shape_of
from fxcompile.writing import write_atomically

_HEADER = "# fxcompile: "


class Dumps:
    """A folder of numbered files, `00-traced.py` and one for each pass; none where no folder is given.

    What an earlier run left there is removed first. The files are written as the work goes on, so that they are there
    where a pass or the emission fails.

    Raises:
        WriteError: the folder cannot be made, or written to.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = 0
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                is_ours = re.fullmatch(r"\d{2,}-[\w-]+\.py", path.name) and path.is_file()
                if is_ours and path.read_bytes().startswith(_HEADER.encode()):
                    path.unlink()
        except OSError as error:
            raise WriteError(
                f"it cannot be written: {error.strerror}", place=str(folder), mend="choose another folder"
            ) from None

    def write(self, name: str, program: Program) -> None:
        """Write the next file."""
        if self.folder is not None:
            text = f"{_HEADER}{name}\n{dump(program)}"
            write_atomically(self.folder / f"{self.count:02d}-{name}.py", text.encode())
            self.count += 1


def dump(program: Program) -> str:
    """The program as Python: its nodes as comments, with shapes and the original layers they compute, and its code."""
    lines = [f"# {spec.name}: {list(spec.shape)} {spec.dtype}" for spec in program.inputs]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        layer = program.layer(node)
        called = function_name(node)
        what = called if layer is None else f"{called}: {describe_layer(layer)} "
        arguments = ", ".join([*map(repr, node.args), *(f"{key}={value!r}" for key, value in node.kwargs.items())])
        origin = ", ".join(node.meta.get(ORIGIN, ()))
        lines.append(f"# {node.name} = {what}({arguments}) {list(shape_of(node) or [])} from [{origin}]")
    return "\n".join([*lines, "", program.module.code.strip(), ""])
