"""What pairs with a likelihood of images share."""

from __future__ import annotations

from torch import Tensor, nn

from flowvi.models.likelihoods import Likelihood
from flowvi.models.pair import ModelGuidePair, check_context

__all__ = ["ImagePair"]


class ImagePair(ModelGuidePair):
    """Base of pairs whose items are images with a likelihood; it checks images and contexts.

    Args:
        likelihood: law of an image given what a decoder makes.
        context_dim: length of the context; 0 for none.
        num_total: number of images in all, where ``x`` is a minibatch.
    """

    def __init__(
        self, likelihood: Likelihood, *, context_dim: int = 0, num_total: int | None = None
    ) -> None:
        super().__init__(num_total=num_total)
        if not isinstance(likelihood, nn.Module):
            raise TypeError(f"`likelihood` must be a module; got {type(likelihood).__name__}.")
        self.likelihood = likelihood
        self.context_dim = context_dim

    def inputs(self, x: Tensor) -> Tensor:
        """Images as an encoder takes them, pixels from 0 to 1."""
        return self.likelihood.inputs(x, next(self.parameters()))

    def check(self, x: Tensor | None, context: Tensor | None, *, values: bool) -> Tensor | None:
        check_context(context, self.context_dim, None if x is None else len(x))
        if x is None:
            return None
        self.likelihood.check(x, values=values)
        return x.to(next(self.parameters()).dtype)
