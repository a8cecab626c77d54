"""Training recipes; run from the repository, not installed."""
