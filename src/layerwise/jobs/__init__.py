"""Job files, stages, runs and receipts."""
