"""Results: grids, the file that keeps them, ROME's files, the figure."""
