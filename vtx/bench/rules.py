"""How fast the rules of VM entry judge a VMCS: near-valid states, without any guest code."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Final

from vmcs.capabilities import Capabilities
from vmcs.fields import FIELDS, Field
from vmcs.rules import CONSISTENCY, EntryContext
from vmcs.template import template
from vtx.vmx.rule_context import rule_context
from vtx.x86.msr_table import msrs_of
from vtx.x86.profile import load_profile

_SEED: Final = 1
_MOST_CHANGES: Final = 4

Change = tuple[Field, int]


def valid_context() -> EntryContext:
    """A VMCS of the default processor that can be entered, with memory that reads as ones."""
    profile = load_profile()
    vmcs = template(Capabilities(profile.vmx_capabilities))
    return rule_context(vmcs, profile, msrs_of(profile), 0, lambda address, size: (1 << 8 * size) - 1)


def near_valid(context: EntryContext, count: int) -> Iterator[list[Change]]:
    """``count`` times one to four changes of its VMCS: two bits flipped for each field that gets a random value."""
    chosen = random.Random(_SEED)
    writable = [each for each in FIELDS if context.capabilities.has(each) and not each.read_only]
    for _ in range(count):
        changes = []
        for _ in range(chosen.randint(1, _MOST_CHANGES)):
            field = chosen.choice(writable)
            flipped = context.vmcs[field] ^ 1 << chosen.randrange(field.bits)
            changes.append((field, flipped if chosen.randrange(3) else chosen.getrandbits(field.bits)))
        yield changes


def rejected(context: EntryContext, states: list[list[Change]]) -> int:
    """How many of ``states`` break a rule; each is made of the valid VMCS of ``context``, and undone again."""
    vmcs = context.vmcs
    count = 0
    for changes in states:
        old = [(field.encoding, vmcs[field]) for field, _ in changes]
        vmcs.changed = {}
        for field, value in changes:
            vmcs[field] = value
        count += CONSISTENCY.check(context, vmcs.changed) is not None
        for encoding, value in reversed(old):
            vmcs.values[encoding] = value
    return count


def states_per_second(count: int) -> float:
    """Near-valid states judged per second of processor time; making and undoing them included, choosing them not."""
    context = valid_context()
    states = list(near_valid(context, count))
    start = time.process_time()
    found = rejected(context, states)
    elapsed = time.process_time() - start
    if not 0 < found < count:
        raise RuntimeError(f"{found} of {count} states break a rule: they are not what is to be measured")
    return count / elapsed
