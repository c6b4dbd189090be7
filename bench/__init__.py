"""Benchmarks: `python -m bench.run` for fasttrace's own numbers, `python -m bench.peers` against others."""
