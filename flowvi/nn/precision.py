"""Networks in half the bits, everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flowvi.nn.conv import GatedConv2d, GatedConvTranspose2d
from flowvi.nn.conv_conditioner import ConvConditioner
from flowvi.nn.denoisers import Denoiser
from flowvi.nn.made import MADE
from flowvi.nn.mlp import MLP

__all__ = ["mixed_precision"]

_NETWORKS = (MLP, MADE, ConvConditioner, Denoiser, GatedConv2d, GatedConvTranspose2d)


def mixed_precision(module: nn.Module) -> nn.Module:
    """Have the networks inside a module multiply in bfloat16, and give back what they were given.

    A network's matrix products and convolutions run under ``torch.autocast``; its result has the
    dtype of its first input again. Parameters, their gradients, the maps between the networks and
    all log-determinants and log-densities keep their precision, so a flow stays exactly
    invertible and its density exact: it is the density of the flow with the rounded networks.
    Networks in float64 stay as they are.

    Networks are flowvi's (of flows, denoisers, encoders and decoders); a module that holds none is
    taken as one itself. Vector fields of continuous flows are left alone, because a solver's
    error estimates would be those of the rounding. What works a network's layers by hand, such as
    the incremental inverse of an autoregressive map, does so in full precision.

    A compiled step repeats an eager one up to that rounding, which is more than
    :class:`flowvi.infer.CompiledSVI` lets pass: give it ``check=0``.

    Meant for GPUs with bfloat16 units. For TF32 products instead,
    ``torch.set_float32_matmul_precision("high")`` is enough.

    Args:
        module: guide, model-and-guide pair, flow or network, built; changed in place.

    Returns:
        The module.

    Raises:
        TypeError: if ``module`` is not a ``torch.nn.Module``.
        ValueError: if it is in mixed precision already.

    References:
        Micikevicius et al. (2018), Mixed precision training, arXiv:1710.03740, section 3.

    Example:
        >>> network = mixed_precision(MLP(2, (8,), 3))
        >>> network(torch.ones(4, 2)).dtype
        torch.float32
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module; got {type(module).__name__}.")
    networks = list(_outermost(module)) or [module]
    if any(isinstance(hook, _Leave) for n in networks for hook in n._forward_hooks.values()):
        raise ValueError("`module` must be in full precision; got one in mixed precision already.")
    for network in networks:
        opened: list[torch.autocast] = []
        network.register_forward_pre_hook(_Enter(opened))
        # Whatever happens inside, autocast ends with the network.
        network.register_forward_hook(_Leave(opened), always_call=True)
    return module


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, _NETWORKS):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


class _Enter:
    """Begins autocast; an object, so that it is copied and saved with its module."""

    def __init__(self, opened: list[torch.autocast]) -> None:
        self.opened = opened

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        device = next((t.device.type for t in inputs if isinstance(t, Tensor)), "cpu")
        # There are no numbers to round on the meta device.
        context = torch.autocast("cpu" if device == "meta" else device, torch.bfloat16)
        context.__enter__()
        self.opened.append(context)


class _Leave:
    """Ends autocast and puts the result back into the dtype of the first input."""

    def __init__(self, opened: list[torch.autocast]) -> None:
        self.opened = opened

    def __call__(self, module: nn.Module, inputs: tuple, output: object) -> object:
        if self.opened:
            self.opened.pop().__exit__(None, None, None)
        dtype = next((t.dtype for t in inputs if isinstance(t, Tensor)), None)

        def restored(part: object) -> object:
            rounded = isinstance(part, Tensor) and part.dtype == torch.bfloat16
            return part.to(dtype) if rounded and dtype is not None else part

        return pytree.tree_map(restored, output)
