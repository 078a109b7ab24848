"""What scripts/bench and scripts/soak share."""
