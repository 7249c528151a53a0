"""Engines behind one Protocol: vLLM and the scripted one."""
