"""Thin adapters: the emulator's own model behind the interface of an RTL block."""
