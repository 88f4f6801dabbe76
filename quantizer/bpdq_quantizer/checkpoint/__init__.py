"""Checkpoint folders: written, checked, described, and loaded by transformers."""
