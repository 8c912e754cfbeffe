"""Automatic and amortised guides made of flows."""

from flowvi.guides.amortised import AmortizedFlow
from flowvi.guides.augmented import AutoAugmentedFlow
from flowvi.guides.auto import AutoFlow
from flowvi.guides.mixture import AutoMixtureFlow
from flowvi.guides.plates import AutoPlateFlow

__all__ = [
    "AmortizedFlow",
    "AutoAugmentedFlow",
    "AutoFlow",
    "AutoMixtureFlow",
    "AutoPlateFlow",
]
