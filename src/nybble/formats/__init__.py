"""Bit layouts of quantised weights: how each format packs them, and the one meaning they all unpack to."""
