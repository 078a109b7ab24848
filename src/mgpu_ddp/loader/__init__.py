"""Samples → padded batches, read ahead by worker processes.

Knows nothing of models.
"""
