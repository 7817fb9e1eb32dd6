"""Measurements of speed and memory, next to the other emulators of this machine: ``vtx bench``."""
