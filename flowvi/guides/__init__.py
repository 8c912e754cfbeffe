"""Automatic and amortised guides made of flows."""

from flowvi.guides.auto import AutoFlow

__all__ = ["AutoFlow"]
