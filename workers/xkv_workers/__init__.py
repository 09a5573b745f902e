"""The Ray side of xKV service: the precompute pipeline."""
