"""Activations: what turns pre-activations into sparse codes. One file each, found by name."""
