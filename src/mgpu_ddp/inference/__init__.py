"""Batches → rows: model input, forward pass and columns, with nothing collective.

Knows nothing of windows or files.
"""
