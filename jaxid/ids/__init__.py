"""Spatial and temporal IDs: their container, its files, and their geometry."""
