"""Typed words → a checked `Config`.

Knows nothing of the machine: whether a device, a folder or a model is there is for others to check.
"""
