"""The published experiments, one a file: functions from models, prompts and IDs to arrays and tidy tables."""
