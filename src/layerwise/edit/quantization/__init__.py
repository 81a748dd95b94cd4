"""Post-training quantization: one engine that walks the stack layer by layer, and the methods that combine in it."""
