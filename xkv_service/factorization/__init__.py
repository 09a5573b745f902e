"""Grouped truncated SVD: byte accounting, Gram matrices, eigenvectors, weights, rounding."""
