"""One job, from claiming its folder to the proof.

Knows nothing of Hydra or of other jobs.
"""
