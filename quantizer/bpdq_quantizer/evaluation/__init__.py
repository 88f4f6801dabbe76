"""How good a model is: perplexity, closeness to the 16-bit model, and scores of lm-eval's tasks."""
