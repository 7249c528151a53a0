"""HTTP, YAML, the command line, and which actor talks to which."""
