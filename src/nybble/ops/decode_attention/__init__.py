"""Attention of one new token to a key-value cache: rotation, append and attention in one launch."""
