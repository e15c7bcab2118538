"""What the losses cost: time, memory, host microseconds and first call, beside eager PyTorch and torch.compile."""
