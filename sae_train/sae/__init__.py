"""Architectures: how rows become pre-activations and codes become reconstructions. One file each."""
