"""Dense cosine similarity maps of CLIP-like models ([DCSM] arXiv 2503.08723)."""
