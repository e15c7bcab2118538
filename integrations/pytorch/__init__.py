"""Plain PyTorch trainers: the demo on a torchvision detector, and callbacks for Lightning and Hugging Face."""
