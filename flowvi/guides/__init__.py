"""Automatic and amortised guides made of flows."""

from flowvi.guides.auto import AutoFlow
from flowvi.guides.plates import AutoPlateFlow

__all__ = ["AutoFlow", "AutoPlateFlow"]
