"""Exact prefill of prefixes in bounded memory, with what compression needs observed on the way."""
