"""Simplifications of a traced graph that the compiler behind it does not make."""

from __future__ import annotations

import torch
from torch import Tensor, fx

__all__ = ["changed_in_place", "simplify"]

_aten = torch.ops.aten
_PASS_ON = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default}
_RESHAPE = {
    _aten.expand.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.permute.default,
}
_LARGEST_CONSTANT = 1 << 14
_LARGEST_PRODUCT = 4096


def simplify(graph: fx.GraphModule) -> None:
    """Rewrite a graph in place: fold constants, drop what does nothing, write out small products.

    Tensors that are changed in place, and their views, are left as they are.
    """
    changed = changed_in_place(graph)
    _drop_identities(graph, changed)
    _fold_constants(graph, changed)
    _compare_with_itself(graph, changed)
    _fold_constants(graph, changed)
    _write_out_products(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def changed_in_place(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes that share memory with one that is changed."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        shared = _shared(node)
        if node in found:
            found.update(shared)
        written = [given for given, is_written in shared.items() if is_written]
        if written:
            found.update([node, *written])
    # Views taken of a changed tensor, later or earlier.
    for node in graph.graph.nodes:
        if any(given in found for given in _shared(node)):
            found.add(node)
    return found


def _shared(node: fx.Node) -> dict[fx.Node, bool]:
    """Arguments that share memory with a result or are changed, and whether they are changed."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    pairs = zip(schema.arguments, node.args, strict=False)
    return {
        given: argument.alias_info.is_write
        for argument, given in pairs
        if argument.alias_info is not None and isinstance(given, fx.Node)
    }


def _drop_identities(graph: fx.GraphModule, changed: set[fx.Node]) -> None:
    for node in graph.graph.nodes:
        if node in changed or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        same = node.target in _RESHAPE and _layout(node) == _layout(source)
        if node.target is _aten.permute.default:
            same = same and list(node.args[1]) == list(range(len(node.args[1])))
        if same or node.target in _PASS_ON:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)


def _layout(node: fx.Node) -> tuple:
    value = node.meta.get("val")
    return (tuple(value.shape), value.stride()) if isinstance(value, Tensor) else (node,)


def _fold_constants(graph: fx.GraphModule, changed: set[fx.Node]) -> None:
    """Compute what depends on no input; fill tensors of one value by that value."""
    values: dict[fx.Node, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(graph, node.target), Tensor):
            values[node] = getattr(graph, node.target)
        elif _is_foldable(node, changed) and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for index, (node, value) in enumerate(values.items()):
        if all(user in values for user in node.users):
            continue
        with graph.graph.inserting_after(node):
            flat = value.reshape(-1)
            if len(flat) and bool((flat == flat[0]).all()):
                new = graph.graph.call_function(
                    _aten.full.default,
                    (list(value.shape), flat[0].item()),
                    {"dtype": value.dtype, "device": value.device},
                )
            elif node.op == "get_attr":
                continue
            else:
                name = f"folded_{len(graph._buffers)}_{index}"
                graph.register_buffer(name, value.detach().clone(), persistent=False)
                new = graph.graph.get_attr(name)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
    graph.graph.eliminate_dead_code()


def _is_foldable(node: fx.Node, changed: set[fx.Node]) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value, tags = node.meta.get("val"), node.target.tags
    known = isinstance(value, Tensor) and value.numel() <= _LARGEST_CONSTANT
    known = known and value.device.type != "meta"
    return known and node not in changed and torch.Tag.nondeterministic_seeded not in tags


def _compare_with_itself(graph: fx.GraphModule, changed: set[fx.Node]) -> None:
    """A tensor equals itself: the density of a Delta at the value that it has just drawn.

    Where the value is not a number the loss is none either, by the model's term.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_aten.eq.Tensor):
        first, second = (_unexpanded(a, changed) for a in node.args)
        if first is not second or _shape(node.args[0]) != _shape(node.args[1]):
            continue
        value = node.meta["val"]
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(
                _aten.full.default,
                (list(value.shape), True),
                {"dtype": torch.bool, "device": value.device},
            )
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _unexpanded(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    while node.target is _aten.expand.default and node not in changed:
        node = node.args[0]
    return node


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _write_out_products(graph: fx.GraphModule) -> None:
    """Small matrix products as sums of products, which fuse with what is around them."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        first, second = node.args[-2:] if node.target is _aten.addmm.default else node.args[:2]
        left, right = _shape(first), _shape(second)
        size = left[0] * left[-1] * (right[-1] if len(right) > 1 else 1)
        size *= left[1] if len(left) == 3 else 1
        if size > _LARGEST_PRODUCT or node.kwargs:
            continue
        call = graph.graph.call_function
        with graph.graph.inserting_before(node):
            new = _PRODUCTS[node.target](call, first, second, left, right)
            if node.target is _aten.addmm.default:
                new = call(_aten.add.Tensor, (node.args[0], new))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _matrix_vector(call, a: fx.Node, b: fx.Node, left: tuple, right: tuple) -> fx.Node:  # noqa: ANN001
    row = call(_aten.unsqueeze.default, (b, 0))
    return call(_aten.sum.dim_IntList, (call(_aten.mul.Tensor, (a, row)), [1]))


def _matrix_matrix(call, a: fx.Node, b: fx.Node, left: tuple, right: tuple) -> fx.Node:  # noqa: ANN001
    batch = len(left) - 2
    if left[-1] == 1:
        return call(_aten.mul.Tensor, (a, b))
    column = call(_aten.unsqueeze.default, (a, batch + 2))
    row = call(_aten.unsqueeze.default, (b, batch))
    return call(_aten.sum.dim_IntList, (call(_aten.mul.Tensor, (column, row)), [batch + 1]))


def _dot(call, a: fx.Node, b: fx.Node, left: tuple, right: tuple) -> fx.Node:  # noqa: ANN001
    return call(_aten.sum.default, (call(_aten.mul.Tensor, (a, b)),))


_PRODUCTS = {
    _aten.mv.default: _matrix_vector,
    _aten.mm.default: _matrix_matrix,
    _aten.addmm.default: _matrix_matrix,
    _aten.bmm.default: _matrix_matrix,
    _aten.dot.default: _dot,
}
