"""Whole models: load a checkpoint folder, fuse the norms of a Hugging Face model, generate text, score text."""
