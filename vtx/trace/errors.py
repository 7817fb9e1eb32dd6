"""What can go wrong with a trace file."""


class TraceError(Exception):
    """A trace cannot be written or read; the message is one line for the person who named the file."""
