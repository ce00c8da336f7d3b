"""Records from files and data sets: read, choose, mix, cache, report."""
