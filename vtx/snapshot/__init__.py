"""Snapshots: the whole machine at one moment, in memory or in a file."""

from vtx.snapshot.file import load_snapshot, save_snapshot
from vtx.snapshot.model import Snapshot, SnapshotError

__all__ = ["Snapshot", "SnapshotError", "load_snapshot", "save_snapshot"]
