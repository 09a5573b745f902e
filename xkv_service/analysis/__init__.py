"""What makes layers compressible together: how alike their keys and values are, and what rank holds them."""
