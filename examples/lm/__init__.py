"""What train_lm.py needs around the training: the text, the two processes, and the report."""
