"""The recurring shapes of conditions and demands, and factories for rules that are nothing but a shape.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Final

from vmcs import fields as f
from vmcs import layouts
from vmcs.bits import bit_range, canonicalize, describe_bits, is_canonical, mask
from vmcs.controls import GATES, Control, ControlWord, describe_controls
from vmcs.fields import CONTROL_FIELDS, Field
from vmcs.rules import legal
from vmcs.rules.model import Condition, Demand, EntryContext, FaultyBits, Test

Bits = int | Callable[[EntryContext], int]

PAGE: Final = 4096

# ---- conditions


def test_of(condition: Condition) -> Test:
    """The test of a condition that has one."""
    assert condition.test is not None
    return condition.test


@cache  # one object for each control: rules with the same condition are evaluated as a group
def on(control: Control) -> Condition:
    """The control is 1, and so is the control that activates its word."""
    word = CONTROL_FIELDS[control.word]
    encoding, bit = word.encoding, control.mask
    gate = GATES.get(control.word)
    text = f"{control} is 1"
    if gate is None:
        return Condition(text, ((word, bit),), lambda context: context.values[encoding] & bit != 0)
    gate_word = CONTROL_FIELDS[gate.word]
    gate_encoding, gate_bit = gate_word.encoding, gate.mask
    return Condition(
        text,
        ((gate_word, gate_bit), (word, bit)),
        lambda context: context.values[gate_encoding] & gate_bit != 0 and context.values[encoding] & bit != 0,
    )


@cache
def off(control: Control) -> Condition:
    """The control is 0, or its word is not activated."""
    word = CONTROL_FIELDS[control.word]
    encoding, bit = word.encoding, control.mask
    text = f"{control} is 0"
    if control.word not in GATES:
        return Condition(text, ((word, bit),), lambda context: context.values[encoding] & bit == 0)
    return negation(on(control), text)


def negation(condition: Condition, text: str) -> Condition:
    """The opposite of ``condition``, in the words of ``text``."""
    test = test_of(condition)
    return Condition(text, condition.reads, lambda context: not test(context), condition.volatile)


def _both(first: Test, second: Test) -> Test:
    return lambda context: first(context) and second(context)


def every(*conditions: Condition) -> Condition:
    """All of the conditions; put the one that is most often false first."""
    *tests, last = (test_of(each) for each in conditions)
    for test in reversed(tests):
        last = _both(test, last)
    return Condition(
        " and ".join(each.text for each in conditions),
        tuple(read for each in conditions for read in each.reads),
        last,
        any(each.volatile for each in conditions),
    )


def either(*conditions: Condition) -> Condition:
    """Any of the conditions."""
    tests = tuple(test_of(each) for each in conditions)
    return Condition(
        " or ".join(each.text for each in conditions),
        tuple(read for each in conditions for read in each.reads),
        lambda context: any(test(context) for test in tests),
        any(each.volatile for each in conditions),
    )


def bit_set(field: Field, bits: int, text: str) -> Condition:
    """Any of ``bits`` of the field is 1."""
    encoding = field.encoding
    return Condition(text, ((field, bits),), lambda context: context.values[encoding] & bits != 0)


def bits_equal(field: Field, bits: int, value: int, text: str) -> Condition:
    """The masked field has this value."""
    encoding = field.encoding
    return Condition(text, ((field, bits),), lambda context: context.values[encoding] & bits == value)


def bits_differ(field: Field, bits: int, value: int, text: str) -> Condition:
    """The masked field does not have this value."""
    encoding = field.encoding
    return Condition(text, ((field, bits),), lambda context: context.values[encoding] & bits != value)


def context_is(text: str, test: Test) -> Condition:
    """A condition on the state of the processor, not on the VMCS."""
    return Condition(text, (), test, volatile=True)


def processor_is(text: str, test: Test) -> Condition:
    """A condition on what the processor is, which never changes."""
    return Condition(text, (), test)


# ---- demands on one field


def _as_function(bits: Bits) -> Callable[[EntryContext], int]:
    return bits if callable(bits) else lambda context: bits


def bits_clear(field: Field, bits: Bits) -> Demand:
    """None of ``bits`` is 1. Bits may come from the context, which must not change while the VMCS is in use."""
    encoding = field.encoding
    if isinstance(bits, int):
        return _constant_bits_clear(field, bits)
    mask_of = bits

    def holds(context: EntryContext) -> bool:
        return not context.values[encoding] & mask_of(context)

    def faulty(context: EntryContext) -> FaultyBits:
        return ((field, context.values[encoding] & mask_of(context)),)

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.values[encoding] & ~mask_of(context)

    return Demand((field,), holds, repair, faulty, legal=lambda context: legal.zeros(field, mask_of(context)))


def _constant_bits_clear(field: Field, bits: int) -> Demand:
    encoding = field.encoding

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.values[encoding] & ~bits

    return Demand(
        ((field, bits),),
        lambda context: not context.values[encoding] & bits,
        repair,
        lambda context: ((field, context.values[encoding] & bits),),
        legal=lambda context: legal.zeros(field, bits),
    )


def bits_required(field: Field, bits: int) -> Demand:
    """All of ``bits`` are 1."""
    encoding = field.encoding

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.values[encoding] | bits

    return Demand(
        ((field, bits),),
        lambda context: context.values[encoding] & bits == bits,
        repair,
        lambda context: ((field, bits & ~context.values[encoding]),),
        legal=lambda context: legal.ones(field, bits),
    )


def fixed_bits(field: Field, must_be_1: Bits, may_be_1: Bits) -> Demand:
    """The bits a processor fixes to 1 are 1, those it fixes to 0 are 0."""
    encoding = field.encoding
    ones, allowed = _as_function(must_be_1), _as_function(may_be_1)

    def wrong(context: EntryContext) -> int:
        value = context.values[encoding]
        return (ones(context) & ~value) | (value & ~allowed(context))

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = (context.values[encoding] | ones(context)) & allowed(context)

    return Demand(
        (field,),
        lambda context: not wrong(context),
        repair,
        lambda context: ((field, wrong(context)),),
        legal=lambda context: legal.fixed(field, ones(context), allowed(context)),
    )


def structure_address(field: Field, alignment: int = PAGE) -> Demand:
    """The physical address of a VMX structure: aligned, and no wider than the processor allows for structures."""
    return bits_clear(field, lambda context: context.beyond_structure_width | (alignment - 1))


def canonical(field: Field) -> Demand:
    """A canonical linear address, for the widest linear addresses of the processor."""
    encoding = field.encoding

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = canonicalize(context.values[encoding], context.linear_address_width)

    def faulty(context: EntryContext) -> FaultyBits:
        value = context.values[encoding]
        return ((field, value ^ canonicalize(value, context.linear_address_width)),)

    return Demand(
        (field,),
        lambda context: is_canonical(context.values[encoding], context.linear_address_width),
        repair,
        faulty,
        legal=lambda context: legal.canonical(field, context.linear_address_width),
    )


def high_bits_identical(field: Field) -> Demand:
    """The bits above the linear-address width are all equal; the topmost bit within it may differ from them."""
    encoding = field.encoding

    def ones(context: EntryContext) -> int:
        return bit_range(63, context.linear_address_width)

    def holds(context: EntryContext) -> bool:
        return context.values[encoding] & ones(context) in (0, ones(context))

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = canonicalize(context.values[encoding], context.linear_address_width)

    return Demand(
        (field,),
        holds,
        repair,
        lambda context: ((field, ones(context)),),
        legal=lambda context: f"{describe_bits(ones(context))} of {field.name} are all 0 or all 1",
    )


def slice_in(field: Field, bits: int, allowed: Collection[int] | Callable[[EntryContext], Collection[int]]) -> Demand:
    """The masked field is one of these values; the first is the repair's choice."""
    encoding = field.encoding
    values_of = allowed if callable(allowed) else lambda context: allowed

    def repair(context: EntryContext) -> None:
        first = next(iter(values_of(context)))
        context.vmcs[field] = (context.values[encoding] & ~bits) | first

    return Demand(
        ((field, bits),),
        lambda context: context.values[encoding] & bits in values_of(context),
        repair,
        lambda context: ((field, bits),),
        legal=lambda context: legal.one_of(field, bits, values_of(context)),
    )


def not_zero(field: Field) -> Demand:
    """The field is not zero; the repair is the smallest number."""

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = 1

    return Demand(
        (field,),
        lambda context: bool(context.vmcs[field]),
        repair,
        legal=lambda context: f"{field.name} is 1 to {field.mask:#x}",
    )


def page_attribute_table(field: Field) -> Demand:
    """Each of the eight bytes is a memory type of the PAT: UC, WC, WT, WP, WB or UC-."""
    valid = frozenset((0, 1, 4, 5, 6, 7))
    encoding = field.encoding

    def wrong(context: EntryContext) -> int:
        value = context.values[encoding]
        return sum(0xFF << shift for shift in range(0, 64, 8) if value >> shift & 0xFF not in valid)

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.values[encoding] & ~wrong(context)

    return Demand(
        (field,),
        lambda context: not wrong(context),
        repair,
        lambda context: ((field, wrong(context)),),
        legal=lambda context: f"each byte of {field.name} is 0, 1, 4, 5, 6 or 7",
    )


# ---- demands on controls


def allowed_word(word: ControlWord) -> Demand:
    """The word keeps to the settings the capability MSRs allow."""
    field = CONTROL_FIELDS[word]
    encoding = field.encoding

    def wrong(context: EntryContext) -> int:
        return context.capabilities.allowed[word].violations(context.values[encoding])

    def repair(context: EntryContext) -> None:
        context.vmcs[field] = context.capabilities.allowed[word].repair(context.values[encoding])

    def allowed(context: EntryContext) -> str:
        settings = context.capabilities.allowed[word]
        text = legal.fixed(field, settings.must_be_1, settings.may_be_1)
        missing = context.values[encoding] & ~settings.may_be_1
        return text + (f"; this processor lacks {describe_controls(word, missing)}" if missing else "")

    return Demand(
        (field,),
        lambda context: not wrong(context),
        repair,
        lambda context: ((field, wrong(context)),),
        legal=allowed,
    )


def _set_control(context: EntryContext, control: Control, value: bool) -> None:
    field = CONTROL_FIELDS[control.word]
    old = context.vmcs[field]
    context.vmcs[field] = old | control.mask if value else old & ~control.mask
    gate = GATES.get(control.word)
    if value and gate:
        gate_field = CONTROL_FIELDS[gate.word]
        if not context.vmcs[gate_field] & gate.mask:
            # The word counted as zero so far: activating it must not bring its stale bits along.
            context.vmcs[field] = control.mask
            context.vmcs[gate_field] = context.vmcs[gate_field] | gate.mask


def control_on(control: Control, because: Control) -> Demand:
    """``control`` is 1; the repair gives up ``because`` on a processor that does not have ``control``."""
    test = test_of(on(control))
    field = CONTROL_FIELDS[control.word]

    def repair(context: EntryContext) -> None:
        if context.capabilities.allows(control):
            _set_control(context, control, True)
        else:
            _set_control(context, because, False)

    def possible(context: EntryContext) -> str:
        if context.capabilities.allows(control):
            return f"{control} is 1" if control is because else f"{control} is 1, or {because} is 0"
        return f"{because} is 0: this processor does not allow {control}"

    return Demand(
        on(control).reads,
        test,
        repair,
        lambda context: ((field, control.mask & ~context.vmcs[field]),),
        legal=possible,
    )


def control_off(control: Control) -> Demand:
    """``control`` is 0."""
    test = test_of(off(control))
    field = CONTROL_FIELDS[control.word]

    def repair(context: EntryContext) -> None:
        _set_control(context, control, False)

    return Demand(on(control).reads, test, repair, lambda context: ((field, control.mask),))


# ---- event injection, which several stages look at

INJECTING: Final = bit_set(f.VM_ENTRY_INTERRUPTION_INFORMATION, 1 << 31, "an event is injected")


def injecting(event_type: int) -> Condition:
    """The VM entry injects an event of this type."""
    article = "an" if layouts.EVENT_TYPES[event_type][0] in "aeio" else "a"
    return bits_equal(
        f.VM_ENTRY_INTERRUPTION_INFORMATION,
        1 << 31 | 7 << 8,
        1 << 31 | event_type << 8,
        f"{article} {layouts.EVENT_TYPES[event_type]} is injected",
    )


def stop_injecting(context: EntryContext) -> None:
    """A repair: inject nothing."""
    context.vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] = context.vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION] & mask(31)
