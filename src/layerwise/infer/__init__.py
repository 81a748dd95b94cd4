"""How a trained model is run."""
