"""Samples by index from any source, and the listing that says which index is which image.

Knows nothing of models or of output.
"""
