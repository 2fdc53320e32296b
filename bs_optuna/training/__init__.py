"""PyTorch training that survives running out of memory."""
