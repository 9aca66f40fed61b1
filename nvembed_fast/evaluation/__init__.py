"""Scores of models on tasks with human labels."""
