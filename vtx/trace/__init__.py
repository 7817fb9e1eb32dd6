"""Traces: events as lines of JSON, written, read back, and described by the schema in ``schema.json``."""

from vtx.trace.errors import TraceError
from vtx.trace.reader import read_trace
from vtx.trace.writer import JsonLinesTracer

__all__ = ["JsonLinesTracer", "TraceError", "read_trace"]
