"""An adapter on disk."""
