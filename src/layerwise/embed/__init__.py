"""What turns raw inputs into the residual stream: one embedding per modality."""
