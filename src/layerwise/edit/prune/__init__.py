"""Taking width out of layers: channels of the residual stream, heads, channels of the feed-forward."""
