"""Ranks: how they join, share out the rows, talk, show that they live, and leave.

Knows nothing of images or models.
"""
