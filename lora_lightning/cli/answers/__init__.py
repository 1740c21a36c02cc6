"""Answers from base models and adapters: what `chat` and `generate` share, and the loop of `chat`."""
