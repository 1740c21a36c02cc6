"""Conversations: turns, templates, what is learned."""
