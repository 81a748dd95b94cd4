"""The self-contained page about a run."""
