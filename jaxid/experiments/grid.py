"""Extraction of spatial IDs from grid scenes, by its earlier names; see `jaxid.ids.extract`."""

from jaxid.ids.extract import SPATIAL_QUESTION as QUESTION
from jaxid.ids.extract import activations_at as activations_at
from jaxid.ids.extract import extract_spatial as extract

__all__ = ["QUESTION", "activations_at", "extract"]
