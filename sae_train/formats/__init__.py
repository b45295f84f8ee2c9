"""Interchange formats: one file each, both directions, on tensors that say plainly what an SAE computes."""
