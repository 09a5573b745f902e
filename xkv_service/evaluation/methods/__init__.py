"""Ways to hold the cache of a prefix, one a file, behind one interface."""
