"""The operations. A folder each: ``op.py`` (public functions, checks, registration), ``reference.py`` (the maths in
PyTorch), ``cost.py`` (which variant), ``cases.py`` (inputs for tests, benches, the compile gate) and the kernels."""

OPERATIONS: dict[str, str] = {
    "norm": "LayerNorm and RMSNorm fused with the residual additions around them",
    "w4a16": "4-bit or 8-bit weight linear: fp16 or bf16 activations, GPTQ or AWQ weights",
    "ln_qkv": "a norm, then queries, keys and values from a 4-bit weight, in one",
    "q4_0": "llama.cpp's Q4_0 weights, activations quantised to Q8_1 inside the kernel",
    "flatquant": "two small transforms around each row, then int4 with a scale a row",
    "w4a4": "4-bit weight linear of activations that are int4 as well",
    "decode_attention": "rotation, append to the cache and attention of one new token",
}
"""Folder name -> one line. ``nybble.ops.<name>.cases`` holds ``BENCH`` (cases for a GPU), ``SMALL`` (for a CPU) and
``parse(shape, dtype)``."""
