"""Passes over loaded models: interventions, captures, traces, reruns and generation."""
