"""A diagnosis as tables to read, with the verdict last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fxcompile.diagnosis import CLEARLY, Diagnosis, number
from fxcompile.file_errors import FileErrors
from fxcompile.side_by_side import LayerError
from fxcompile.tables import Row, table, wrapped
from fxcompile.yardstick import Errors, worst

OUTPUTS = 3
"""Outputs with a column of their own; of more, only the worst is shown."""

SITES = 20
"""Sites shown; the JSON form has all."""


def text(diagnosis: Diagnosis, width: int) -> str:
    """The tables for the passes, the layers and the sites, and what follows from them."""
    lines = [*_passes(diagnosis, width), "", *_layers(diagnosis, width), ""]
    if diagnosis.sites:
        lines += [*_sites(diagnosis, width), ""]
    for sentence in (*diagnosis.verdict(), *(f"note: {note}" for note in diagnosis.notes)):
        lines += wrapped(sentence, width, "  ")
    return "\n".join(lines)


def _passes(diagnosis: Diagnosis, width: int) -> list[str]:
    names = list(diagnosis.errors) if len(diagnosis.errors) <= OUTPUTS else []
    held_out = any(item.held_out is not None for item in diagnosis.passes)

    def of(errors: Errors) -> list[str]:
        return [number(errors[name]) for name in names] or [number(worst(errors))]

    rows = []
    for item in diagnosis.passes:
        cells = [*of(item.errors), number(item.change), number(item.without)]
        cells += [number(worst(item.held_out))] if item.held_out is not None else []
        rows.append(Row(item.text, f"{item.outcome}, {item.rewritten} of {item.found} sites", tuple(cells)))
    if isinstance(diagnosis.file, FileErrors):
        cells = [*of(diagnosis.file.original), number(worst(diagnosis.file.program)), ""]
        rows.append(Row("ONNX file", "in ONNX Runtime", (*cells, "") if held_out else tuple(cells)))
    heads = [*(names or ["worst output"]), "by itself", "without", *(["held out"] if held_out else [])]
    return [
        *wrapped(
            f"Error of the outputs after each pass, on {diagnosis.measured_on}; up to "
            f"{number(worst(diagnosis.rounding))} it is rounding. By itself: against the outputs before this pass. "
            "Without: the error of the whole pipeline without this pass.",
            width,
            "",
        ),
        *table(Row("pass", "", tuple(heads)), rows, width),
    ]


def _layers(diagnosis: Diagnosis, width: int) -> list[str]:
    floor = worst(diagnosis.rounding)
    rows: list[Row] = []
    for quiet, group in groupby(diagnosis.layers, lambda item: max(item.error, item.own or 0.0) <= floor):
        layers = list(group)
        rows += [_summary(layers)] if quiet else [_layer(item, floor) for item in layers]
    if len(rows) == 1 and not rows[0].cells:
        return [f"Layer by layer: {rows[0].text}"]
    return [
        *wrapped(
            "Error of each layer's output, in the order of the data. Own: what it makes of the original's inputs. "
            "Alone: the error of the outputs with this layer as compiled and all else as in the original. Mended: with "
            "this layer as in the original and all else as compiled.",
            width,
            "",
        ),
        *table(Row("layer", "", ("error", "", "own", "alone", "mended")), rows, width),
    ]


def _layer(item: LayerError, floor: float) -> Row:
    jump = "jump" if item.error > CLEARLY * max(item.inherited, floor) else ""
    own = "?" if item.own is None else number(item.own) if item.own else ""
    sites: dict[str, list[str]] = {}
    for rewriter, site in item.by:
        sites.setdefault(site, []).append(rewriter)
    by = (
        f"{site if site != item.name else ''} rewritten by {', '.join(passes)}".lstrip()
        for site, passes in sites.items()
    )
    return Row(
        item.name, "; ".join([item.kind, *by]), (number(item.error), jump, own, number(item.alone), number(item.mended))
    )


def _summary(layers: Sequence[LayerError]) -> Row:
    count, rewritten = len(layers), sum(bool(item.by) for item in layers)
    return Row("...", f"{count} layer{'s' if count > 1 else ''}, {rewritten} rewritten: no error but rounding")


def _sites(diagnosis: Diagnosis, width: int) -> list[str]:
    tried = sum(item.without is not None for item in diagnosis.sites)
    texts = {item.passed: diagnosis.passes[item.passed].text for item in diagnosis.sites}
    rows = []
    for item in diagnosis.sites[:SITES]:
        again = item.without is not None
        errors = (item.only, item.without) if again else (item.alone, item.mended)
        cells = (number(error) if again or error is None else f"({number(error)})" for error in errors)
        said = item.change if len(texts) == 1 else f"{texts[item.passed]}: {item.change}"
        rows.append(Row(item.name, said, (number(item.fit), *cells)))
    if len(diagnosis.sites) > SITES:
        rows.append(Row("...", f"{len(diagnosis.sites) - SITES} more, which --json lists"))
    heading = (
        f"Sites of {', '.join(texts.values())}, {tried} of {len(diagnosis.sites)} compiled again: the error of the "
    )
    heading += "outputs with it only, and without it."
    if tried < len(diagnosis.sites):
        heading += " (In brackets, where that was not done: alone and mended, as above.)"
    return [
        *wrapped(heading, width, ""),
        *table(Row("site", "", ("when fitted", "only it", "without it")), rows, width),
    ]
