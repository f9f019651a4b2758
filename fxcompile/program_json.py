"""Checks the JSON of an exported program before torch's deserialiser sees it.

That deserialiser turns what it reads into Python in several ways: names become generated source that is exec'd, an
operator's name is looked up with getattr from `torch` on (`torch.os.system` would be found), expressions of sizes go
through `sympy.sympify`, which evals, a tree specification can name any module to import, and guards are source. So
every string is held to the rule of the field that it stands in; a string in a field without a rule is refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Refused(Exception):
    """The file holds what could run code; the message is a clause that says what."""


def _matching(pattern: str, what: str) -> Callable[[str], None]:
    compiled = re.compile(pattern)

    def check(text: str) -> None:
        if len(text) > 4000 or compiled.fullmatch(text) is None:
            raise Refused(f"{what} {quoted(text)}, which could be code")

    return check


def quoted(text: str) -> str:
    """A string of the file for a message: short and printable."""
    plain = ascii(text)[1:-1]
    return f"'{plain[:60]}...'" if len(plain) > 60 else f"'{plain}'"


# operators

_SYM_OPERATORS = frozenset(
    "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ lshift rshift getitem".split()  # noqa: SIM905
)
_SYM_MATH = frozenset("ceil floor trunc sqrt pow log log2 exp sin cos tan asin acos atan sinh cosh tanh".split())  # noqa: SIM905
_HIGHER_ORDER = frozenset({"cond", "wrap_with_autocast", "wrap_with_set_grad_enabled"})
_NAMESPACES = frozenset({"aten", "prims", "quantized_decomposed", "torchvision"})
_WRITES_FILES = frozenset({"save", "from_file"})
_NO_RESULT = ("_assert", "sym_", "_local_scalar", "item", "is_", "numel")


def check_operator(target: str) -> None:
    """Only tensor operators and arithmetic on sizes may be called by an untrusted graph.

    Raises:
        Refused: anything else that could be found by its name.
    """
    parts = target.split(".")
    if not all(re.fullmatch(r"[A-Za-z_]\w*", part) for part in parts):
        known = False
    elif parts[0] == "_operator":
        known = len(parts) == 2 and parts[1] in _SYM_OPERATORS
    elif parts[0] == "math":
        known = len(parts) == 2 and parts[1] in _SYM_MATH
    elif parts[:2] == ["torch", "ops"]:
        known = _is_tensor_operator(parts[2:])
    else:
        known = len(parts) == 2 and parts[0] == "torch" and bool(re.fullmatch(r"_?sym_[a-z0-9]+", parts[1]))
    if not known:
        raise Refused(f"its graph calls {quoted(target)}, which is no tensor operator")


def _is_tensor_operator(parts: list[str]) -> bool:
    if len(parts) == 2 and parts[0] == "higher_order":
        return parts[1] in _HIGHER_ORDER
    if len(parts) != 3 or parts[0] not in _NAMESPACES or parts[1] in _WRITES_FILES:
        return False
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    overload = getattr(packet, parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        return False
    returns_tensor = any("Tensor" in str(item.type) for item in overload._schema.returns)
    return returns_tensor or parts[1].startswith(_NO_RESULT)


# expressions of sizes

_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}")
_EXPRESSION = re.compile(r"[\w ,.()*/+\-<>=!&|~']{1,2000}")
_FUNCTIONS = frozenset(
    """Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs floor ceiling Eq Ne Lt Le Gt Ge Equality Unequality
    StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not FloorDiv ModularIndexing Where PythonMod CleanDiv
    CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt
    RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator""".split()  # noqa: SIM905
)
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_CONSTANTS = frozenset({"oo", "int_oo", "true", "false", "True", "False"})
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UAdd, ast.USub, ast.Eq, ast.NotEq,
    ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BitAnd, ast.BitOr, ast.Invert,
)  # fmt: skip


def check_expression(text: str) -> None:
    """Only arithmetic over symbols and small numbers may reach `sympy.sympify`, which evals.

    Raises:
        Refused: attributes, strings, unknown functions, powers that would not end, or what is no expression.
    """
    try:
        tree = ast.parse(text, mode="eval") if _EXPRESSION.fullmatch(text) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    nodes = list(ast.walk(tree)) if tree is not None else []
    texts = {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and _takes_text(node)}
    if not nodes or not all(_is_arithmetic(node, id(node) in texts) for node in nodes):
        raise Refused(f"a size is given by the expression {quoted(text)}, which is not plain arithmetic")


def _takes_text(node: ast.Call) -> bool:
    return bool(node.args) and isinstance(node.func, ast.Name) and node.func.id in ("Symbol", "Float")


def _is_arithmetic(node: ast.AST, may_be_text: bool) -> bool:
    if not isinstance(node, _NODES):
        return False
    if isinstance(node, ast.Name):
        return bool(_SYMBOL.fullmatch(node.id)) or node.id in _CONSTANTS or node.id in _FUNCTIONS
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right)
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            return False
        return node.func.id not in _POWERS or (len(node.args) == 2 and _is_small(node.args[1]))
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, (bool, int))
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, str):  # other functions would sympify it
            return may_be_text and bool(
                _SYMBOL.fullmatch(value) or re.fullmatch(r"-?[\d.]{1,40}(e[-+]?\d{1,3})?", value)
            )
        return isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63)
    return True


def _is_small(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer":
        return len(node.args) == 1 and _is_small(node.args[0])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _is_small(node.operand)
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and abs(node.value) <= 16


# trees of inputs and outputs

_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size"})
_TREE_FIELDS = frozenset({"type", "context", "children_spec"})


def check_call_tree(text: str) -> None:
    """A tree of (args, kwargs): the keywords become parameters in generated source.

    Raises:
        Refused: as `check_tree` does, or a keyword that is no name.
    """
    check_tree(text)
    parts = json.loads(text)[1]["children_spec"]
    if len(parts) != 2 or any(part["type"] is None for part in parts):
        raise Refused("its tree of inputs is malformed")
    keywords = json.loads(parts[1]["context"])
    for key in keywords if isinstance(keywords, list) else []:
        _name(str(key))


def check_tree(text: str) -> None:
    """Only plain containers: the context of others names modules to import (enum, defaultdict) or classes.

    Raises:
        Refused: another container, or a context that is no list of plain keys.
    """
    try:
        _, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise Refused("its tree of inputs or outputs does not parse") from None
    todo = [tree]
    while todo:
        node = todo.pop()
        if not isinstance(node, dict) or set(node) != _TREE_FIELDS or not isinstance(node["children_spec"], list):
            raise Refused("its tree of inputs or outputs is malformed")
        todo.extend(node["children_spec"])
        if node["type"] is None and node["context"] is None:
            continue
        if node["type"] not in _CONTAINERS:
            raise Refused(f"its inputs or outputs hold a {quoted(str(node['type']))}, which is no plain container")
        try:
            keys = json.loads(node["context"])
        except (ValueError, TypeError, RecursionError):
            raise Refused("its tree of inputs or outputs is malformed") from None
        for key in [] if keys is None else keys if isinstance(keys, list) else [keys]:
            if isinstance(key, str):
                _text(key)
            elif not isinstance(key, int):
                raise Refused("its tree of inputs or outputs names code to import")


# the whole program

_name = _matching(r"[^\W\d]\w*|", "it names a value")
_path = _matching(r"[\w.\-/:+@ ]*", "it names a weight")
_text = _matching(r"[\w \-.,:;/+*=()\[\]|@<>&%^~?!]*", "it holds the text")
_number = _matching(r"-?Infinity|NaN", "in place of a number it holds")
_device = _matching(r"[a-z]{1,16}", "it names a device")

_STRINGS: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names", "verifiers"), _name),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"), _path),
    **dict.fromkeys(("as_float", "as_floats", "as_float_lists", "real", "imag"), _number),
    **dict.fromkeys(("target", "as_operator"), check_operator),
    **dict.fromkeys(("as_string", "as_strings", "torch_version"), _text),
    "in_spec": check_call_tree,
    "out_spec": check_tree,
    "expr_str": check_expression,
    "type": _device,
    "path_name": _matching(r"(weight|tensor)_\d+", "it keeps a pickled object in"),
}
_MAPS: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"), _name),
    **dict.fromkeys(("range_constraints", "opset_version", "as_string_to_argument"), _name),
    "config": _path,
}
_DROPPED: dict[str, Callable[[], Any]] = {"guards_code": list, "treespec_namedtuple_fields": dict}
_KEPT_METADATA = {
    "stack_trace": re.compile(r"[^\x00-\x08\x0b-\x1f\x7f]{0,100000}"),
    "nn_module_stack": re.compile(r"[\w.,;:()\[\]'@<> \-/]{0,100000}"),
    "torch_fn": re.compile(r"[\w.,;:]{0,1000}"),
}


def checked_program(data: object) -> Any:
    """The JSON of an exported program without guards and without metadata that fxcompile does not read.

    Raises:
        Refused: a string that could become code, an object that is no tensor, an unknown field with text.
    """
    return _checked(data, "")


def _checked(value: Any, field: str) -> Any:
    if isinstance(value, str):
        if field not in _STRINGS:
            raise Refused(f"its field {quoted(field)} holds text, which this version of fxcompile does not know")
        _STRINGS[field](value)
        return value
    if isinstance(value, list):
        return [_checked(item, field) for item in value]
    if not isinstance(value, dict):
        return value
    if field == "metadata":
        return _metadata(value)
    if field in _MAPS:
        _all(value, _MAPS[field])
        return {key: _checked(item, "") for key, item in value.items()}
    if "as_custom_obj" in value or "custom_obj" in value or (field == "custom_obj_values" and value):
        raise Refused("it holds script objects")
    if value.get("use_pickle"):
        raise Refused("it holds pickled tensors")
    return {key: _DROPPED[key]() if key in _DROPPED else _checked(item, key) for key, item in value.items()}


def _all(names: Iterable[str], rule: Callable[[str], None]) -> None:
    for name in names:
        rule(name)


def _metadata(metadata: dict[str, Any]) -> dict[str, str]:
    return {
        key: metadata[key]
        for key, pattern in _KEPT_METADATA.items()
        if isinstance(metadata.get(key), str) and pattern.fullmatch(metadata[key])
    }
