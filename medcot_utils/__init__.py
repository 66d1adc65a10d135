"""Helpers of the medcot notebook series. Light to import: torch, transformers and the rest are imported where they are used."""

__version__ = "0.2.0"
