"""Hydra's configuration files, shipped as `sae_train.conf`: `pkg://` finds them only beside this module."""
