"""A demonstration: a torchvision detector distilled with kdops from nothing to a report, in minutes on a CPU.

Run it with ``python -m kdops.integrations.pytorch.demo --help``.
"""
