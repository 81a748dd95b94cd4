"""The stack: layers, what runs them, what wraps and what watches them."""
