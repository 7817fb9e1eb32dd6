"""Coroutines that run inside the simulator, and what they draw from."""
