"""A program's canonical form as text, from the outputs back: the names and the order of nodes do not matter."""

import io
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from fxcompile.exported import quietly
from fxcompile.program import FEATURE, ORIGIN, Program, fetch
from fxcompile.tracing import trace


def form(program: Program) -> list[str]:
    """A line for each operation that an output needs: what it is, its options, its arguments."""
    seen: dict[fx.Node, str] = {}
    lines: list[str] = []

    def value(item: Any) -> str:
        if isinstance(item, fx.Node):
            return visit(item)
        if isinstance(item, (tuple, list)):
            return f"({', '.join(map(value, item))}{',' if len(item) == 1 else ''})"
        if isinstance(item, dict):
            return f"{{{', '.join(f'{key}: {value(entry)}' for key, entry in item.items())}}}"
        if isinstance(item, slice):
            parts = [item.start, item.stop] + ([item.step] if item.step is not None else [])
            return ":".join("" if part is None else value(part) for part in parts)
        return repr(item)

    def visit(node: fx.Node) -> str:
        if node not in seen:
            arguments = [value(item) for item in node.args]
            arguments += [f"{key}={value(item)}" for key, item in sorted(node.kwargs.items())]
            seen[node] = f"%{len(seen)}"
            lines.append(" ".join([f"{seen[node]} =", head(program, node), *arguments]))
        return seen[node]

    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    lines.append(f"return {value(output.args[0])}")
    return lines


def head(program: Program, node: fx.Node) -> str:
    """What a node does, without its arguments; layers with weights go by their names."""
    if node.op == "call_module":
        layer = program.module.get_submodule(str(node.target))
        name = f" '{node.target}'" if any(True for _ in layer.parameters()) else ""
        return f"{type(layer).__name__}({layer.extra_repr()}){name}"
    if node.op == "get_attr":
        tensor = fetch(program.module, str(node.target))
        return f"{type(tensor).__name__} {tuple(tensor.shape)}"
    if node.op == "placeholder":
        return f"input '{node.target}'"
    return getattr(node.target, "__name__", str(node.target))


class Written(nn.Module):
    """A model whose forward is a function of its input, and of itself where it has layers."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        self.takes_self = bool(layers)
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x) if self.takes_self else self.function(x)


def exported(model: nn.Module, inputs: tuple[Any, ...], dynamic: bool = True) -> ExportedProgram:
    """`torch.export` of a model, as users write it."""
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if dynamic else None
    with quietly():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes, strict=False)


def through_file(program: ExportedProgram) -> ExportedProgram:
    """The same, saved as .pt2 and loaded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)


def roads(model: nn.Module, inputs: tuple[Tensor, ...], files: bool = True) -> dict[str, Program]:
    """A model by every road: symbolic, exported with a free batch, and files with a fixed batch of 2 and of 1."""
    made = {"symbolic": trace(model, inputs), "exported": trace(exported(model, inputs))}
    if files:
        made["file, batch of 2"] = trace(through_file(exported(model, inputs, dynamic=False)))
        one = tuple(tensor[:1] for tensor in inputs)
        made["file, batch of 1"] = trace(through_file(exported(model, one, dynamic=False)))
    return made


LAYERS = {kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}
CONTAINERS = {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
AS_LAYERS = re.compile(
    r"(conv(_transpose)?[123]d|convolution|linear|addmm|prelu|(batch|layer|group|instance|rms)_norm|lstm|gru|embedding|"
    r"relu6?|leaky_relu|elu|gelu|silu|sigmoid|tanh|hardtanh|hardswish|hardsigmoid|softmax|log_softmax|dropout[123]?d?|"
    r"(adaptive_)?(max|avg)_pool[123]d)_?"
)
"""Functions that are layers in canonical form; those with weights may stay functions where the weights are computed."""


IN_PLACE = {getattr(operator, name) for name in dir(operator) if name[:1] == "i" and f"__{name}__" in dir(operator)}
IN_PLACE -= {operator.index, operator.inv, operator.invert}


def assert_canonical(program: Program, model: nn.Module | None = None) -> None:
    """What canonical form promises of any program; what it says of the model's layers, too, where one is given."""
    program.graph.lint()
    weights = {node for node in program.graph.nodes if node.op == "get_attr"}
    for node in program.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_module", "call_function", "output"), node.format_node()
        assert node.users or node.op in ("placeholder", "output"), f"{node} is dead"
        if node.op == "call_module":
            layer = program.module.get_submodule(node.target)
            assert type(layer) in LAYERS - CONTAINERS, layer
            assert not any(True for _ in layer.children())
            assert not layer.training
            assert getattr(layer, "inplace", False) is False
            assert not layer._forward_hooks
            assert not layer._forward_pre_hooks
        elif node.op == "call_function":
            name = node.target.__name__
            assert not isinstance(node.target, torch._ops.OpOverload), node.format_node()
            assert node.target not in IN_PLACE, name
            assert not name.endswith("_") or name in ("and_", "or_"), name
            assert "out" not in node.kwargs
            assert node.target is not operator.setitem
            assert not AS_LAYERS.fullmatch(name) or not weights & set(node.all_input_nodes[1:]), node.format_node()
            assert not AS_LAYERS.fullmatch(name) or len(node.all_input_nodes) > 1, node.format_node()
    assert_shapes(program)
    assert_origins(program, model)
    assert_inputs(program)


def assert_shapes(program: Program) -> None:
    """The shape and dtype on each node are those of a run."""
    values: dict[fx.Node, Any] = {}
    examples = iter(program.examples)
    for node in program.graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            if node.op == "placeholder":
                values[node] = next(examples)
            elif node.op == "get_attr":
                values[node] = fetch(program.module, node.target)
            elif node.op == "call_module":
                values[node] = program.module.get_submodule(node.target)(*args, **kwargs)
            elif node.op == "call_function":
                values[node] = node.target(*args, **kwargs)
            else:
                return
        value, meta = values[node], node.meta.get("tensor_meta")
        if isinstance(value, Tensor):
            assert (meta.shape, meta.dtype) == (value.shape, value.dtype), node.format_node()
        elif isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
            assert [item and item.shape for item in meta] == [getattr(item, "shape", None) for item in value], node


def assert_origins(program: Program, model: nn.Module | None) -> None:
    """Each node says where in the model it comes from; layers with weights say which layer they are."""
    modules = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}
    for node in program.graph.nodes:
        (origin,) = node.meta[ORIGIN]
        assert node.meta[FEATURE] == node.name
        if model is None:
            continue
        scope = origin.rpartition(".")[0]
        assert origin in modules or scope in modules or scope.rpartition(".")[0] in modules, origin
        if node.op == "call_module" and origin in modules:
            layer = program.module.get_submodule(node.target)
            assert node.target == origin
            own = dict(modules[origin].named_parameters(recurse=False))
            held = {name: tensor for name, tensor in layer.named_parameters(recurse=False) if name in own}
            if type(modules[origin]) is type(layer):
                assert not any(
                    torch.equal(tensor, own[name]) and tensor is not own[name] for name, tensor in held.items()
                )


def assert_inputs(program: Program) -> None:
    """Placeholders, examples and the description of the inputs say the same."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    assert [node.target for node in placeholders] == [spec.name for spec in program.inputs]
    assert len({spec.name for spec in program.inputs}) == len(placeholders)
    for spec, example in zip(program.inputs, program.examples, strict=True):
        assert (spec.shape, spec.dtype) == (tuple(example.shape), example.dtype)
    assert len(program.outputs(*program.examples)) == len(program.output_names) == len(set(program.output_names))
