"""Activation normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowvi.transforms._algebra import log_diagonal
from flowvi.transforms.base import Direction, FlowTransform

__all__ = ["ActNorm", "initialize_norms"]


class ActNorm(FlowTransform):
    r"""Elementwise affine map :math:`y = \ell + \sigma x` that can take its start from data.

    It is the identity until :meth:`initialize` sets location and scale from a batch; afterwards
    both are ordinary parameters. With ``lazy`` the first call in training mode does so with its
    own input: ``call_and_ladj`` then returns, and ``inverse_and_ladj`` likewise, values of mean 0
    and standard deviation 1 over the batch. Explicit initialisation is the better choice under
    ``torch.vmap`` and in guides, whose base values are already normal.

    Args:
        input_dim: number of dimensions, at least 1.
        lazy: whether the first call in training mode initialises.

    Shape:
        x: ``(*batch, input_dim)``; ladj: ``(*batch,)``, in nats.

    Raises:
        ValueError: by the first lazy call, if its batch has fewer than 2 rows.

    References:
        Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, section 3.1.

    Example:
        >>> norm = ActNorm(1)
        >>> norm.initialize(torch.tensor([[1.0], [3.0]]))
        >>> norm.inv(torch.tensor([2.0]))
        tensor([0.], grad_fn=<MulBackward0>)
    """

    has_score_recursion = True

    def __init__(self, input_dim: int, *, lazy: bool = False) -> None:
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        # A number, so that it goes where floating-point state goes: into Pyro's parameter store.
        self.register_buffer("initialized", torch.zeros(()))
        # Mirrors the buffer for a lazy map: a branch on the buffer would wait for the device.
        self._pending = lazy

    def initialize(self, batch: Tensor, direction: Direction = Direction.INVERSE) -> None:
        """Set location and scale so that a batch comes out with mean 0 and deviation 1.

        A dimension that is constant over the batch keeps the scale 1.

        Args:
            batch: values ``(*batch, input_dim)``, at least 2 rows.
            direction: ``INVERSE`` if the batch lies on the target side and its preimage is to be
                normalised (density estimation), ``FORWARD`` if it lies on the base side.

        Raises:
            ValueError: if the batch has the wrong last size, fewer than 2 rows, or an entry that
                is not finite; or if the direction is ``BOTH``.
        """
        self._check("batch", batch, None)
        _check_finite(batch)
        if direction is Direction.BOTH:
            raise ValueError("`direction` must be FORWARD or INVERSE; got BOTH.")
        self._normalise(batch, direction)

    @torch.no_grad()
    def _normalise(self, batch: Tensor, direction: Direction) -> None:
        rows = batch.detach().reshape(-1, self.input_dim)
        if rows.shape[0] < 2:
            raise ValueError(f"`batch` must have at least 2 rows; got {rows.shape[0]}.")
        mean, scale = rows.mean(0), rows.std(0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if direction is Direction.INVERSE:
            self.loc.copy_(mean)
            self.log_scale.copy_(scale.log())
        else:
            self.loc.copy_(-mean / scale)
            self.log_scale.copy_(-scale.log())
        self.initialized.fill_(1.0)
        self._pending = False

    def _start(self, batch: Tensor, direction: Direction) -> None:
        """Normalise by the first batch, unless the state came from a store in the meantime."""
        self._pending = False
        if batch.is_meta or not self.initialized:
            self._normalise(batch, direction)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        if self._pending and not self.initialized.is_meta:
            self._pending = not bool(self.initialized)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._pending and self.training:
            self._start(x, Direction.FORWARD)
        return self.loc + self.log_scale.exp() * x, log_diagonal(self.log_scale, x)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._pending and self.training:
            self._start(y, Direction.INVERSE)
        return (y - self.loc) * (-self.log_scale).exp(), -log_diagonal(self.log_scale, y)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._call_and_ladj(x, context)
        return y, ladj, score.detach() * (-self.log_scale.detach()).exp()


@torch.no_grad()
def initialize_norms(
    transform: FlowTransform, batch: Tensor, context: Tensor | None = None
) -> None:
    """Start every :class:`ActNorm` inside a map from data, in one inverse pass.

    Each is initialised with what reaches it of the batch, so that it passes on values of mean 0
    and standard deviation 1; those initialised before start anew.

    Args:
        transform: map with activation normalisations inside.
        batch: values on the target side ``(*batch, *event_shape)``.
        context: their context ``(*batch, context_dim)``.

    Raises:
        ValueError: if the map has no activation normalisation, or the batch is not finite, has
            fewer than 2 rows or the wrong shape.
    """
    norms = [module for module in transform.modules() if isinstance(module, ActNorm)]
    if not norms:
        raise ValueError("`transform` must hold an ActNorm; got none.")
    _check_finite(batch)
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.training = norm._pending = True
        norm.initialized.zero_()
    try:
        transform.inverse_and_ladj(batch, context)
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.training, norm._pending = mode, False


def _check_finite(batch: Tensor) -> None:
    # On the meta device there are no numbers to check.
    if not batch.is_meta and not batch.isfinite().all():
        bad = int((~batch.isfinite()).sum())
        raise ValueError(f"`batch` must be finite; got {bad} entries that are not.")
