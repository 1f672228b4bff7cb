"""Runs, IDs and dense maps as one self-contained HTML page."""
