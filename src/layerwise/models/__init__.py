"""Assembled models: embedding, stack, head; their presets, files and Hugging Face forms."""
