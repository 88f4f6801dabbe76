"""Passes over a whole model: blocks, embeddings, rotation, tuning, sensitivities and allocation, KV-cache scales."""
