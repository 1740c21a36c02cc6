"""Images and sounds in conversations: found in rows, read, and prepared by the model's own processor."""
