"""Bytes of an image → pixels as a model takes them, on the CPU or the GPU.

Knows nothing of datasets, ranks or models.
"""
