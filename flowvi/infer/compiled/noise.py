"""Taking random draws out of a traced graph, so that many steps' draws are made at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, fx

__all__ = ["Draw", "NoiseTable", "hoist_draws"]

_aten = torch.ops.aten
_RANDOM_BETWEEN = getattr(_aten.random_, "from")

# Operations that fill a tensor, whatever was in it.
_FILLS = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.exponential_.default,
    _aten.bernoulli_.float,
    _aten.cauchy_.default,
    _aten.log_normal_.default,
    _aten.geometric_.default,
    _aten.random_.default,
    _RANDOM_BETWEEN,
    _aten.random_.to,
}
_LIKE = {
    _aten.randn_like.default: _aten.normal_.default,
    _aten.rand_like.default: _aten.uniform_.default,
}
_MADE = {
    _aten.randn.default: _aten.normal_.default,
    _aten.rand.default: _aten.uniform_.default,
}
_NORMAL = _aten.normal_.default


@dataclass(frozen=True)
class Draw:
    """One random tensor of a step that depends on nothing else in it.

    Args:
        fill: operation that fills a tensor in place; ``None`` for a permutation.
        args: its numbers.
        kwargs: its options.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
        size: for a permutation, the number of items that the first ``shape[0]`` are taken of.
    """

    fill: torch._ops.OpOverload | None
    args: tuple
    kwargs: tuple
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    size: int = 0

    @property
    def numel(self) -> int:
        """Numbers in one draw."""
        return reduce(operator.mul, self.shape, 1)

    @property
    def kind(self) -> tuple:
        """Draws of one kind are rows of one table."""
        if self.fill is None:
            return (self.size, self.shape, self.dtype, str(self.device))
        return (str(self.fill), self.args, self.kwargs, self.dtype, str(self.device))

    def filling(self, out: Tensor) -> Callable[[], object]:
        """Function that draws once, as the program itself would, into a contiguous tensor."""
        if self.fill is None:
            return lambda: out.copy_(self._permutation())
        # The tensor's own method, which is quicker to call than the operation.
        method = getattr(out, self.fill.overloadpacket.__name__)
        return partial(method, *self.args, **dict(self.kwargs))

    def _permutation(self) -> Tensor:
        order = torch.randperm(self.size, dtype=self.dtype, device=self.device)
        return order[: self.shape[0]]


class NoiseTable:
    """The draws of many steps: one table per kind of draw, one row per step.

    Args:
        draws: the draws of a step, in the order of the program.
        num_rows: most steps that are drawn at once.
    """

    def __init__(self, draws: Sequence[Draw], num_rows: int) -> None:
        self.draws = tuple(draws)
        self.num_rows = num_rows
        kinds: dict[tuple, list[Draw]] = {}
        self.places: list[tuple[int, int]] = []
        for draw in draws:
            if draw.fill is None:
                row = kinds[(len(kinds), *draw.kind)] = []
            else:
                row = kinds.setdefault(draw.kind, [])
            position = next(i for i, other in enumerate(kinds.values()) if other is row)
            self.places.append((position, sum(d.numel for d in row)))
            row.append(draw)
        self._kinds = list(kinds.values())
        self.tables = [
            torch.zeros(
                num_rows, sum(d.numel for d in row), dtype=row[0].dtype, device=row[0].device
            )
            for row in self._kinds
        ]
        self._first = [
            draw.filling(self.tables[i][0, at : at + draw.numel].view(draw.shape))
            for draw, (i, at) in zip(self.draws, self.places, strict=True)
        ]

    def draw_one(self) -> None:
        """Fill the first row, in the order in which the program draws."""
        for fill in self._first:
            fill()

    def draw_many(self, num_steps: int) -> None:
        """Fill rows at once: another stream of random numbers than step after step."""
        for row, table in zip(self._kinds, self.tables, strict=True):
            places = table[:num_steps]
            for place in places if row[0].fill is None else (places,):
                row[0].filling(place)()

    def rows(self, tables: Sequence[Tensor], row: Tensor) -> list[Tensor]:
        """The draws of the step that ``row``, ``(1,)``, counts; for use in a graph."""
        picked = [table[row].reshape(-1) for table in tables]
        return [
            picked[i][at : at + draw.numel].reshape(draw.shape)
            for draw, (i, at) in zip(self.draws, self.places, strict=True)
        ]


def hoist_draws(graph: fx.GraphModule) -> tuple[Draw, ...]:
    """Turn draws that depend on nothing but shapes into inputs, before all other inputs.

    Draws whose law depends on tensors (gamma, a Bernoulli with a tensor of probabilities) stay,
    and so does all that is drawn after one: numbers must come in the order of an eager step.

    Returns:
        One entry per new input, in the order in which the graph drew.
    """
    nodes = list(graph.graph.nodes)
    first, draws = nodes[0], []
    for node in nodes:
        draw = _as_draw(node)
        if draw is None:
            if _is_random(node):
                break
            continue
        sliced = _only_head(node) if draw.fill is None else None
        if sliced is not None:
            node, draw = sliced, _head(draw, sliced)
        with graph.graph.inserting_before(first):
            place = graph.graph.placeholder(f"draw_{len(draws)}")
        place.meta.update(node.meta)
        node.replace_all_uses_with(place)
        source = node.args[0] if sliced is not None else None
        graph.graph.erase_node(node)
        if source is not None:
            graph.graph.erase_node(source)
        draws.append(draw)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tuple(draws)


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def _as_draw(node: fx.Node) -> Draw | None:
    target = node.target
    if node.op != "call_function" or node.kwargs.get("generator") is not None:
        return None
    if target in _FILLS:
        fill, args = target, node.args[1:]
    elif target in _LIKE:
        fill, args = _LIKE[target], ()
    elif target in _MADE:
        fill, args = _MADE[target], ()
    elif target is _aten.randint.low:
        fill, args = _RANDOM_BETWEEN, node.args[:2]
    elif target is _aten.randint.default:
        fill, args = _RANDOM_BETWEEN, (0, node.args[0])
    elif target is _aten.randperm.default:
        return _draw(node, None, (), node.args[0])
    else:
        return None
    if any(isinstance(a, fx.Node) for a in (*args, *node.kwargs.values())):
        return None
    return _draw(node, fill, tuple(args), 0)


def _draw(node: fx.Node, fill: torch._ops.OpOverload | None, args: tuple, size: int) -> Draw:
    value = node.meta["val"]
    options = tuple(node.kwargs.items()) if node.target in _FILLS else ()
    return Draw(fill, args, options, tuple(value.shape), value.dtype, value.device, size)


def _only_head(node: fx.Node) -> fx.Node | None:
    """The one slice ``[:b]`` through which a permutation is used."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not _aten.slice.Tensor:
        return None
    _, dim, start, *_ = (*users[0].args, 0, 0)
    step = users[0].args[4] if len(users[0].args) > 4 else 1
    return users[0] if (dim, start, step) == (0, 0, 1) else None


def _head(draw: Draw, node: fx.Node) -> Draw:
    shape = tuple(node.meta["val"].shape)
    return Draw(None, (), (), shape, draw.dtype, draw.device, draw.size)
