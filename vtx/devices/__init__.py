"""Devices of the machine: each knows offsets only, never the address or port it sits at.

A device gets what it drives by injection (an interrupt line, a byte sink, a clock) and keeps its guest-visible state in
one attrs record of plain data, so a snapshot is a deep copy of that record. Time is virtual (`vtx.devices.clock`).
"""
