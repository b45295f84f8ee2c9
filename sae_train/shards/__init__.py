"""Activation shards: the unit in which rows are harvested, shuffled, stored, trained on and resumed."""
