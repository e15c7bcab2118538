"""The version, alone in its module so that setup can read it without importing PyTorch."""

__version__ = "0.1.0"
