"""Training: rows to batches, the contrastive loss, steps, and the trainer."""
