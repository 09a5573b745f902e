"""What one model's layers share, measured once and used by every compression after it."""
