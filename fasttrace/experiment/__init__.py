"""Experiments as plain data, without a model: settings, cells, noise."""
