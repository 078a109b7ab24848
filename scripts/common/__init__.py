"""Shared by scripts/bench and scripts/soak."""
