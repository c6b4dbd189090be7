"""Fusing: faster equivalents of a model's modules while a trace runs."""
