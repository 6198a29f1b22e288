"""4-bit weight linear: fp16 or bf16 activations times a packed GPTQ or AWQ weight."""
