"""Seeded bugs: every one must be caught, or the harness is not trusted."""
