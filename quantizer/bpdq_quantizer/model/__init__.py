"""The source: what can be opened and quantized, its weights as they are needed, its text, and what flows through it."""
