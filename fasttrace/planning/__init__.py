"""Planning: from cells to the index tables of one pass."""
