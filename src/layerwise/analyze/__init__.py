"""Looking at models: plain functions (model, data) -> findings."""
