"""Autoencoders whose latents are inferred in the order in which they are generated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from pyro import sample
from pyro.distributions import Distribution
from torch import Tensor, nn

from flowvi.models.image_pair import ImagePair
from flowvi.models.likelihoods import Likelihood

__all__ = ["Stage", "TopDownVAE"]


class Stage(nn.Module, ABC):
    """One layer of latents: its laws given the state from above, and the state it hands on.

    Shape:
        state: what the stage above made, the batch first; None above the first of a ladder.
    """

    @abstractmethod
    def prior(self, state: Tensor | None) -> Distribution:
        """Law of the latents in the model."""

    @abstractmethod
    def posterior(self, state: Tensor | None, evidence: Tensor) -> Distribution:
        """Law of the latents in the guide.

        Args:
            state: what the stage above made.
            evidence: what the encoder made for this stage.
        """

    @abstractmethod
    def advance(self, state: Tensor | None, z: Tensor) -> Tensor:
        """State for the stage below."""


class TopDownVAE(ImagePair):
    r"""Autoencoder with stages of latents that model and guide both pass from the top down.

    .. math:: p(z) = \prod_l p(z_l \mid s_l), \qquad q(z \mid x) = \prod_l q(z_l \mid s_l, e_l(x)),
        \qquad s_{l-1} = g_l(s_l, z_l)

    The state s is made by the same networks in both, so the guide corrects what the model
    expects. Sites are "z1", next to the image, to "zL".

    Args:
        encoder: maps images to what each stage gets of them, the top first.
        stages: the stages, the top first.
        decoder: maps the last state to what the likelihood takes.
        likelihood: law of an image.
        start: state above the top stage, a tensor that is learned; None for none.
        num_total: number of images in all, where ``x`` is a minibatch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        stages: Sequence[Stage],
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        start: Tensor | None = None,
        num_total: int | None = None,
    ) -> None:
        super().__init__(likelihood, num_total=num_total)
        if not stages:
            raise ValueError("`stages` must hold at least one stage; got none.")
        self.encoder = encoder
        self.stages = nn.ModuleList(stages)
        self.decoder = decoder
        self.start = None if start is None else nn.Parameter(start)

    def generate(self, context: Tensor | None) -> Distribution:
        state = self.start
        for name, stage in self._named_stages():
            state = stage.advance(state, sample(name, stage.prior(state)))
        return self.likelihood(self.decoder(state))

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        evidence, state = self.encoder(self.inputs(x)), self.start
        for (name, stage), seen in zip(self._named_stages(), evidence, strict=True):
            state = stage.advance(state, sample(name, stage.posterior(state, seen)))

    def _named_stages(self) -> Iterator[tuple[str, Stage]]:
        for k, stage in enumerate(self.stages):
            yield f"z{len(self.stages) - k}", stage
