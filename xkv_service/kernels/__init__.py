"""GPU kernels, each beside the PyTorch code it is held against. Imported only where there is a GPU."""
