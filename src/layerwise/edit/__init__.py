"""Model to model, once."""
