"""Artifact formats, keys, blob store and catalog of xKV service. Knows no model, no Ray and no HTTP."""
