"""llama.cpp's Q4_0 weights with activations quantised to Q8_1."""
