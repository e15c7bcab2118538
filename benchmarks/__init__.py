"""The cost of the losses (time, memory, host time, first call), compared with eager PyTorch and torch.compile."""
