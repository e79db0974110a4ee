"""Tokenizer, base, policies and reward models in memory, and sampling from them."""
