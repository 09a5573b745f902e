"""GPU kernels, each beside the PyTorch code it is held against. `probe.py` says where they run."""
