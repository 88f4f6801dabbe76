"""Files that are whole or not there, and hidden states that live in them."""
