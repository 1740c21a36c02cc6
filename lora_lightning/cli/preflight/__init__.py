"""What can be known before a run: the config, the machine, memory."""
