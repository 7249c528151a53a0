"""Handles: one module per actor that is called; the only place with `.remote`."""
