"""Decisions as pure functions and pure state machines: `now` is always an argument."""
