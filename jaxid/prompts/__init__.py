"""Pictures and questions as arrays, and where every word of a question sits."""
