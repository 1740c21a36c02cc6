"""Configs of other tools, read into ours."""
