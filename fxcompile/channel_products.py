"""How the channels of operands go together in sums of products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxcompile.channel_calls import arguments, shape, unknown
from fxcompile.channel_labels import Kept, Labelling, Labels, Value


def matmul(labels: Labelling, node: fx.Node) -> Value:
    first, second = arguments(node)[:2]
    a, b = len(shape(first)), len(shape(second))
    batch = [f"batch{place}" for place in range(max(a, b) - 2, 0, -1)]
    left = [*batch[len(batch) - (a - 2) :], "m", "k"] if a > 1 else ["k"]
    right = [*batch[len(batch) - (b - 2) :], "k", "n"] if b > 1 else ["k"]
    result = [*batch, *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])]
    return product(labels, node, [(first, left), (second, right)], result)


def einsum(labels: Labelling, node: fx.Node) -> Value:
    equation, *operands = arguments(node)
    terms, arrow, result = equation.partition("->")
    letters = [list(term) for term in terms.split(",")]
    if "." in equation or not arrow or any(len(set(term)) < len(term) for term in (*letters, list(result))):
        return unknown(labels, node)
    return product(labels, node, list(zip(operands, letters, strict=True)), list(result))


def product(
    labels: Labelling, node: fx.Node, operands: Sequence[tuple[object, Sequence[str]]], result: Sequence[str]
) -> Value:
    """A sum of products over all indices that the result does not have; these go in all operands at once."""
    met: dict[str, list[tuple[Labels | None, int]]] = {}
    for operand, names in operands:
        for name, axis, count in zip(names, labels.axes(operand), shape(operand), strict=True):
            met.setdefault(name, []).append((axis, count))
    found = {
        name: labels.together(own, f"'{node.name}' multiplies them with what is no channel")
        for name, own in met.items()
    }
    for name, own in met.items():
        if name not in result and len(own) == 1:
            labels.fix(own[0][0], f"'{node.name}' sums over them")
    return tuple(found[name] for name in result)


def attention(labels: Labelling, node: fx.Node) -> Value:
    """softmax(Q Kᵀ / sqrt(E)) V: Q and K may lose features, and V others; the scale stays that of E."""
    query, key, value = arguments(node)[:3]
    q, k, v = (labels.axes(item) for item in (query, key, value))
    if node.kwargs.get("enable_gqa") or len(arguments(node)) > 3 or len({len(q), len(k), len(v)}) > 1:
        return unknown(labels, node)
    for axis in (q[-2], k[-2], v[-2]):
        labels.fix(axis, f"'{node.name}' takes the softmax over them")
    mask = node.kwargs.get("attn_mask")
    labels.fix_all(labels.values.get(mask) if isinstance(mask, fx.Node) else None, f"'{node.name}' masks by them")

    def together(axis: int, *operands: object) -> Labels | None:
        met = [(labels.axes(item)[axis], shape(item)[axis]) for item in operands]
        return labels.together(met, f"'{node.name}' multiplies them with what is no channel")

    given = (*(together(axis, query, key, value) for axis in range(len(q) - 2)), None, v[-1])
    together(-1, query, key)
    width = shape(query)[-1]
    features = q[-1]
    if features is not None and "scale" not in node.kwargs:

        def resize(kept: Kept) -> tuple[tuple[Any, ...], dict[str, Any]]:
            scale = {} if kept(features).all() else {"scale": width**-0.5}
            return node.args, dict(sorted({**node.kwargs, **scale}.items()))

        labels.resized[node] = resize
    return given
