"""Many conversations on one model at once: continuous batching over compressed and exact prefixes."""
