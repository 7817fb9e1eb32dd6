"""The processor without virtualization: state, profiles, paging, events, the instructions the model executes.

`processor` is the loop that ties them to an execution engine and to a virtualization extension, through the protocols
in `execution`, `virtualization`, `second_level` and `platform`. The reading order is in the documentation.
"""
