"""What RTL and Python must agree on: interface layouts and architectural numbers, declared once."""
