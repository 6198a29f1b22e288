"""The linear layer of int4 activations and int4 weights."""
