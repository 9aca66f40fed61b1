"""Training data: hard negatives by teachers."""
