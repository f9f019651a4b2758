"""What `bisect` found: the figures, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fxcompile.file_errors import FileErrors
from fxcompile.report import Outcome
from fxcompile.side_by_side import LayerError
from fxcompile.yardstick import Errors, off, worst

SCHEMA = 1
"""Version of the JSON form; README.md documents the schema."""

CLEARLY = 3.0
"""How many times another an error must be to be worth a word."""


@dataclass
class PassError:
    """One pass of the pipeline.

    Attributes:
        text, contract, outcome: as in the report of a compilation.
        rewritten, found: how many sites it rewrote, of how many.
        errors: of each output after this pass, against the original.
        change: error of the outputs against those before this pass.
        without: error of the whole pipeline without this pass; None where the pass changes nothing but rounding.
        held_out: `errors` on held-out calibration data, where a case is measured.
        broken: how it breaks its contract, a sentence each.
    """

    text: str
    contract: str
    outcome: Outcome
    rewritten: int
    found: int
    errors: Errors
    change: float
    without: float | None = None
    held_out: Errors | None = None
    broken: list[str] = field(default_factory=list)


@dataclass
class SiteError:
    """One site that a pass rewrote.

    Attributes:
        name, change: the layer, and what was replaced by what.
        passed: the pass, as its place in the pipeline, from 0.
        fit: error of the site's output when it was fitted; None for exact passes.
        without: error of the outputs when all is compiled again without this site; None where that was not done.
        only: the same with this site, and no other that costs error.
        alone, mended: of its layer, in the compiled network as it is.
        mends: passes with options that leave the site out.
    """

    name: str
    change: str
    passed: int
    fit: float | None
    without: float | None = None
    only: float | None = None
    alone: float | None = None
    mended: float | None = None
    mends: list[str] = field(default_factory=list)


@dataclass
class Diagnosis:
    """What a pipeline costs on some inputs, and where.

    All errors are relative L2 errors, `||d|| / ||y||` over all samples, and for outputs that are integers the share of
    elements that differ. Where one number stands for several outputs, it is the worst one's.

    Attributes:
        measured_on: the inputs, in words.
        rounding: for each output, the error up to which nothing is off.
        errors: of each output of the compiled program.
        passes: in the order of the pipeline.
        layers: in the order of the data.
        sites: of the passes that cost error, the most costly first; none where nothing is off.
        file: the ONNX file, or why there is none; None where it was not asked for.
        notes: what else there is to know, a sentence each.
        seconds: time by stage.
    """

    model: str
    pipeline: str
    seed: int
    measured_on: str
    rounding: Errors
    errors: Errors
    passes: list[PassError] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    sites: list[SiteError] = field(default_factory=list)
    file: FileErrors | str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_off(self) -> bool:
        """Whether the compiled program is further from the original than rounding explains."""
        return off(self.errors, self.rounding)

    @property
    def file_is_off(self) -> bool:
        """Whether the ONNX file is further from the program than rounding explains."""
        return isinstance(self.file, FileErrors) and off(self.file.program, self.rounding)

    @property
    def worst_pass(self) -> PassError | None:
        """The pass that costs the most: without it the error is the smallest."""
        tried = [item for item in self.passes if item.without is not None]
        return min(tried, key=lambda item: (item.without, -item.change), default=None)

    @property
    def worst_site(self) -> SiteError | None:
        """The site that costs the most: without it the error is the smallest."""
        return self.sites[0] if self.sites else None

    def verdict(self) -> list[str]:
        """What is wrong and what mends it, a sentence each."""
        said = []
        for item in self.passes:
            more = len(item.broken) - 1
            said += [item.broken[0] + (f"; and so it does at {more} more" if more > 0 else "")] if item.broken else []
        if self.is_off:
            said += [*self._pass_sentences(), *self._site_sentences(), *self._layer_sentences()]
        if self.file_is_off:
            said += self._file_sentences()
        elif isinstance(self.file, str):
            said.append(f"there is no ONNX file to measure: {self.file}")
        elif self.file is not None and self.file.refused:
            said.append(f"compiling would not write the ONNX file: {self.file.refused}")
        if not self.is_off and not self.file_is_off:
            said.append(
                f"on {self.measured_on} nothing is off: the error {number(worst(self.errors))} is no more than the "
                f"{number(worst(self.rounding))} that rounding accounts for"
            )
        return said

    def _pass_sentences(self) -> list[str]:
        culprit = self.worst_pass
        error = worst(self.errors)
        if culprit is None or culprit.without is None:
            return [f"the error is {number(error)}, and no pass by itself makes more than rounding of it"]
        said = [f"the pass that costs the most is {culprit.text}: {number(error)} with it, "
                f"{number(culprit.without)} without it"]  # fmt: skip
        last = self.passes[-1].held_out
        if last is not None and error > CLEARLY * worst(last):
            said.append(
                f"on held-out calibration data the error is only {number(worst(last))}: "
                "the calibration data holds nothing like this case"
            )
        return said

    def _site_sentences(self) -> list[str]:
        culprit = self.worst_site
        if culprit is None:
            return []
        of = self.passes[culprit.passed].text
        if culprit.without is None:
            return [f"of the sites, '{culprit.name}' of {of} seems to cost the most; none was compiled again"]
        said = f"the site that costs the most is '{culprit.name}' of {of}: {number(culprit.without)} without it"
        if culprit.only is not None:
            said += f", {number(culprit.only)} with it only"
        following = next((item for item in self.sites[1:] if item.without is not None), None)
        if following is not None:
            said += f"; the next is '{following.name}', {number(following.without)} without it"
        return [said, f"to leave it out: {' or '.join(culprit.mends)}"]

    def _layer_sentences(self) -> list[str]:
        least = worst(self.rounding)
        return [
            f"layer '{item.name}' is {number(item.own)} off by itself, and no pass says that it rewrote it: "
            "one changes more than its sites"
            for item in self.layers
            if item.own is not None and item.own > least and not item.by
        ][:1]

    def _file_sentences(self) -> list[str]:
        assert isinstance(self.file, FileErrors)
        exported = self.file.unsimplified
        blamed = "torch.onnx.export" if exported is not None and off(exported, self.rounding) else "onnxsim"
        return [
            f"the ONNX file is {number(worst(self.file.program))} off the program that it was made from; the step to "
            f"blame is {blamed} (before onnxsim: {number(worst(exported or {}))})"
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, in the documented JSON schema."""
        held = plain(asdict(self))
        if isinstance(self.file, str):
            held["file"] = {"reason": self.file}
        for item in held["sites"]:
            item["pass"] = item.pop("passed")
        return {
            "schema": SCHEMA,
            **held,
            "is_off": self.is_off or self.file_is_off,
            "worst_pass": next((index for index, item in enumerate(self.passes) if item is self.worst_pass), None),
            "worst_site": 0 if self.sites else None,
            "verdict": self.verdict(),
        }

    def text(self, width: int = 120) -> str:
        """Tables for the passes, the layers and the sites, and the verdict."""
        from fxcompile.diagnosis_text import text

        return text(self, width)

    def __str__(self) -> str:
        return self.text()


def number(error: float | None) -> str:
    """An error in a few characters."""
    return "" if error is None else f"{error:.3g}"


def plain(value: Any) -> Any:
    """Data as JSON has it: an infinite error is the text "inf"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
