"""Rows of text to packed token batches, in numpy alone."""
