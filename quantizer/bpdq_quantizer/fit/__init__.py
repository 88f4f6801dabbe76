"""What fits a card: bytes of weights and of the KV cache, from a model's config.json."""
