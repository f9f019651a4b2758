"""The mutants of a source file: what mutmut's operators make of it, one small change each.

mutmut's own driver copies each function once for each mutant, which neither pydantic's classes nor tables at the top of
a module can bear. So only its operators are used here, on whole modules. What a type checker holds to account is left
alone: annotations and decorators; and, as mutmut does, docstrings and the arguments of `len` and `isinstance`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutant_results import Mutant
from mutmut.mutation.file_mutation import NEVER_MUTATE_FUNCTION_CALLS
from mutmut.mutation.mutators import mutation_operators


def mutants_of(root: Path, path: Path) -> list[Mutant]:
    """All different mutants of a file, in the order of its lines."""
    visitor = _Visitor(str(path.relative_to(root)), path.read_text())
    visitor.wrapper.visit(visitor)
    different = {re.sub(r",\s*\)", ")", item.code): item for item in visitor.found}  # with or without a last comma
    return sorted(different.values(), key=lambda item: item.line)


def changed_lines(old: str, new: str) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """The first line that differs, from 1, and the lines that go and that come, without indentation."""
    ours, theirs = old.splitlines(), new.splitlines()
    blocks = [
        block for block in difflib.SequenceMatcher(None, ours, theirs, False).get_opcodes() if block[0] != "equal"
    ]
    first, last = blocks[0], blocks[-1]
    gone, come = ours[first[1] : last[2]], theirs[first[3] : last[4]]
    return first[1] + 1, tuple(line.strip() for line in gone), tuple(line.strip() for line in come)


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str, code: str) -> None:
        super().__init__()
        self.path, self.code = path, code
        self.wrapper = MetadataWrapper(cst.parse_module(code))
        self.blocks = [self.wrapper.module.code_for_node(item) for item in self.wrapper.module.body]
        self.at = 0
        self.scopes: list[cst.FunctionDef | cst.ClassDef] = []
        self.statements: list[cst.CSTNode] = []
        self.found: list[Mutant] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_left_alone(node):
            return False
        if node in self.wrapper.module.body:
            self.at = self.wrapper.module.body.index(node)  # type: ignore[arg-type]
        if isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement)):
            self.statements.append(node)
        self.found += self.mutants(node)
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.scopes.append(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self.scopes and self.scopes[-1] is original_node:
            self.scopes.pop()
        if self.statements and self.statements[-1] is original_node:
            self.statements.pop()

    def mutants(self, node: cst.CSTNode) -> Iterator[Mutant]:
        for kind, operator in mutation_operators:
            if not isinstance(node, kind):
                continue
            for changed in operator(node):
                code = self.with_change(node, changed)
                if code == self.code:
                    continue
                line, before, after = changed_lines(self.code, code)
                scope = ".".join(item.name.value for item in self.scopes)
                called = any(isinstance(item, cst.FunctionDef) for item in self.scopes)
                yield Mutant(self.path, code, scope, called, line, self.span(), before, after)

    def with_change(self, node: cst.CSTNode, changed: cst.CSTNode) -> str:
        """The whole source; only the statement of the module that holds the node is written again, for speed."""
        blocks, module = self.blocks, self.wrapper.module
        statement = module.body[self.at].deep_replace(node, changed)
        assert isinstance(statement, cst.CSTNode)
        text = "".join([*blocks[: self.at], module.code_for_node(statement), *blocks[self.at + 1 :]])
        return self.code.replace("".join(blocks), text)

    def span(self) -> tuple[int, int]:
        statement = self.statements[-1]
        position = self.get_metadata(PositionProvider, statement)
        body = getattr(statement, "body", None)
        end = position.end.line
        if isinstance(statement, cst.FunctionDef):
            return position.start.line, end  # of a default, whatever runs the function
        if isinstance(statement, cst.BaseCompoundStatement) and isinstance(body, cst.IndentedBlock) and body.body:
            end = max(position.start.line, self.get_metadata(PositionProvider, body.body[0]).start.line - 1)
        return position.start.line, end


def _is_left_alone(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Name):
        return node.func.value in NEVER_MUTATE_FUNCTION_CALLS
    if isinstance(node, cst.Param):
        return node.default is not None and not isinstance(node.default, (cst.Name, cst.BaseNumber, cst.BaseString))
    return isinstance(node, (cst.Annotation, cst.Decorator))
