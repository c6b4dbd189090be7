"""Runs: a set of facts into a folder, by any number of processes."""
