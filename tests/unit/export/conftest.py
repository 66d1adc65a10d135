"""Shared by the tests of this room: what many made-up runs have in common is computed once."""

from computed_once import statistics_computed_once, undrawn_figures

__all__ = ["statistics_computed_once", "undrawn_figures"]
