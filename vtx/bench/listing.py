"""Machine code written down as a listing: bytes and, behind a semicolon, what they mean."""

from __future__ import annotations


def code(listing: str) -> bytes:
    """The bytes of a listing: one instruction per line, hexadecimal, up to the semicolon."""
    return b"".join(bytes.fromhex(line.partition(";")[0]) for line in listing.splitlines())
