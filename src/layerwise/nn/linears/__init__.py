"""Kinds of linears beyond the dense one; `layerwise.nn.linear` has their interface and the table of them."""
