"""Federated customization of large models: the contract, the loop, the methods."""

__version__ = "0.1.0"
