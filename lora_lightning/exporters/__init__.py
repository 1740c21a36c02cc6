"""Formats that other libraries read, one file a direction."""
