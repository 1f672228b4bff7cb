"""One model family a file: config, network, key table and processor."""
