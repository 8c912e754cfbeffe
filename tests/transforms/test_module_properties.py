"""Properties of every transform as a module: copies, one pass, compilation, devices.

Continues test_properties.py. Only the `torch.compile` test needs `-m slow`.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from building import SkewBase, build, context_of, every
from torch import nn

from flowvi.distributions import Flow
from flowvi.nn import MADE, MLP, ConvConditioner
from flowvi.transforms import Direction, FlowTransform
from flowvi.transforms.base import common_shape

# 9. Copies, files and shared parameters.


@every
def test_copies_after_use(name: str) -> None:
    case, transform = build(name, drawn=True)
    flow, context = Flow(transform), context_of(case, 4)
    flow(context).rsample((3,))
    x = torch.randn(4, *case.event_shape)
    expected = transform.call_and_ladj(x, context)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded = Flow(case.make())
    loaded.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), loaded):
        torch.testing.assert_close(
            twin.transform.call_and_ladj(x, context), expected, rtol=0, atol=0
        )
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in flow.parameters()}


@every
def test_inverse_shares_parameters(name: str) -> None:
    _, transform = build(name, drawn=False)
    inverse = transform.inv
    assert isinstance(inverse, FlowTransform)
    assert {id(p) for p in inverse.parameters()} == {id(p) for p in transform.parameters()}


# 10. One pass, nothing stale.


@every
def test_one_network_evaluation(name: str) -> None:
    case, transform = build(name, drawn=True)
    counts: dict[nn.Module, int] = {}

    def count(module: nn.Module, *_: object) -> None:
        counts[module] = counts.get(module, 0) + 1

    for module in transform.modules():
        if isinstance(module, (MLP, MADE, ConvConditioner)):
            module.register_forward_hook(count)
    q = Flow(transform)(context_of(case, 4))
    y = q.rsample((3,))
    after_draw = dict(counts)
    q.log_prob(y)
    assert counts == after_draw
    if transform.cheap is not Direction.INVERSE:
        assert all(number == 1 for number in counts.values())


@every
def test_nothing_is_stale(name: str) -> None:
    case, transform = build(name, drawn=True)
    flow, context = Flow(transform, SkewBase(case.event_shape)), context_of(case, 4)
    q = flow(context)
    y = q.rsample((3,))
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = flow(context).log_prob(y.detach().clone())
    torch.testing.assert_close(q.log_prob(y), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        transform.call_and_ladj(y.detach(), context),
        copy.deepcopy(transform).call_and_ladj(y.detach(), context),
    )


# 11. Compilation.


@pytest.mark.slow
@every
def test_compiles_whole(name: str) -> None:
    case, transform = build(name, drawn=True)
    cheap = transform.call_and_ladj
    if transform.cheap is Direction.INVERSE:
        cheap = transform.inverse_and_ladj
    x, context = torch.randn(5, *case.event_shape), context_of(case, 5)
    torch._dynamo.reset()
    compiled = torch.compile(cheap, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, context), cheap(x, context), rtol=0, atol=1e-12)


# Devices.


@every
def test_runs_on_meta(name: str) -> None:
    case, transform = build(name, drawn=False)
    transform.to("meta")
    x = torch.empty(4, *case.event_shape, device="meta", requires_grad=True)
    context = torch.empty(4, case.context_dim, device="meta") if case.context_dim else None
    for method in (transform.call_and_ladj, transform.inverse_and_ladj):
        value, ladj = method(x, context)
        assert value.is_meta
        assert value.shape == x.shape
        assert ladj.shape == (4,)
        (value.sum() + ladj.sum()).backward()


@pytest.mark.gpu
@every
def test_gpu_equals_cpu(name: str) -> None:
    case, transform = build(name, drawn=True)
    x, context = torch.randn(50, *case.event_shape), context_of(case, 50)
    expected = transform.call_and_ladj(x, context)
    transform.cuda()
    there = None if context is None else context.cuda()
    y, ladj = transform.call_and_ladj(x.cuda(), there)
    torch.testing.assert_close((y.cpu(), ladj.cpu()), expected, rtol=1e-9, atol=1e-9)
    again, _ = transform.inverse_and_ladj(y, there)
    torch.testing.assert_close(again.cpu(), x, rtol=0, atol=1e-6)


def test_common_shape_is_that_of_torch() -> None:
    shapes = [(), (1,), (3,), (2, 1), (2, 3), (4, 1, 3), (4, 2, 1), (0,), (0, 3)]
    for group in itertools.product(shapes, repeat=3):
        try:
            expected = torch.broadcast_shapes(*group)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="do not broadcast"):
                common_shape(*group)
        else:
            assert common_shape(*group) == expected
