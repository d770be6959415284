"""Banks on disk. Only this folder knows how one lies there; only it writes or reads one."""
