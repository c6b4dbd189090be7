"""Reports: averages over facts, their figures, the page, exports."""
