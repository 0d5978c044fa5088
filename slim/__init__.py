"""A slim checkpoint: what is cut, its file, writing one."""
