"""Base layers: how a layer is called, and how its weight is read and written."""
