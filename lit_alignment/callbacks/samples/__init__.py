"""Fixed records, answered or scored at each validation, in one report."""
