"""Pictures: procedural scenes, and the readers and writers of the published datasets' layouts."""
