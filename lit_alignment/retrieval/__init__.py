"""Passage indexes: files, search, and how good the search is."""
