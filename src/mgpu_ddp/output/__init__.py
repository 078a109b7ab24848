"""Rows → durable parts, a manifest and the proof.

Never imports torch, and knows nothing of ranks.
"""
