"""Tables of examples from files, folders and the hub."""
