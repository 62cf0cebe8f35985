"""Who may connect: key files, allow-lists, and what the ports ask of strangers."""
