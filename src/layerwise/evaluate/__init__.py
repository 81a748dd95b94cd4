"""Model and data to metrics."""
