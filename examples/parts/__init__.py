"""What several examples share: real text, small models, the training loop."""
