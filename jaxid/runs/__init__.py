"""The published experiments as resumable jobs on data sets: tables, summaries and figures in a folder."""
