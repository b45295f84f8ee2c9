"""Metrics of an SAE on held-out rows. One file each, found by name."""
