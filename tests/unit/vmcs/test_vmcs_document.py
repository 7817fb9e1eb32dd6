"""VMCSs as JSON: what is understood, what is refused, and in which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmcs_baseline import FULL, OLD, REVISION, long_mode_guest

from vmcs import fields as f
from vmcs.document import DocumentError, from_region, parse, to_json
from vmcs.fields import FIELDS
from vmcs.region import LaunchState, Vmcs


def test_parse__nothing_said_is_a_clear_vmcs_of_zeros() -> None:
    document = parse("{}", FULL)
    assert not any(document.vmcs.values.values())
    assert document.instruction == "VMLAUNCH"
    assert document.vmcs.launch_state is LaunchState.CLEAR
    assert not document.vmcs.shadow
    assert document.ia32e_mode
    assert not document.blocking_by_mov_ss
    assert document.memory == {}


def test_parse__everything_said() -> None:
    document = parse(
        json.dumps(
            {
                "about": "an example",
                "launch state": "launched",
                "VMCS address": "0x5000",
                "shadow VMCS": True,
                "IA-32e mode": False,
                "blocking by MOV SS": True,
                "memory": {"0x7000": "0x0102030405060708", "28680": 9},
                "fields": {"Guest RIP": "0x7c00", "guest rsp": 4096, "0x681C": "0x2000", "Host CR3": "0b1000"},
            }
        ),
        FULL,
    )
    assert document.instruction == "VMRESUME"
    assert document.vmcs_address == 0x5000
    assert document.vmcs.shadow
    assert not document.ia32e_mode
    assert document.blocking_by_mov_ss
    assert (document.vmcs[f.GUEST_RIP], document.vmcs[f.GUEST_RSP]) == (0x7C00, 0x2000)
    assert document.vmcs[f.HOST_CR3] == 8
    assert bytes(document.memory[0x7000 + offset] for offset in range(16)) == bytes.fromhex(
        "0807060504030201 0900000000000000"
    )


def test_parse__the_instruction_wins_over_the_launch_state() -> None:
    assert parse('{"instruction": "VMRESUME"}', FULL).launching is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: "),
        ('{"fields": []}', "fields: expected an object"),
        ('{"feilds": {}}', "unknown member 'feilds' (did you mean 'fields'?)"),
        ('{"fields": {"Guest RIPP": 0}}', "no VMCS field is called 'Guest RIPP' (did you mean 'Guest RIP'?)"),
        ('{"fields": {"0x681D": 0}}', "no VMCS field is called '0x681D'"),
        ('{"fields": {"Guest RIP": "seven"}}', "Guest RIP: 'seven' is not a number"),
        ('{"fields": {"Guest RIP": true}}', "Guest RIP: expected a number such as 0x2000"),
        ('{"fields": {"Guest RIP": 1.5}}', "Guest RIP: expected a number such as 0x2000"),
        ('{"fields": {"Guest RIP": -1}}', "Guest RIP: not a number of 64 bits"),
        (
            '{"fields": {"Virtual-processor identifier": 65536}}',
            "Virtual-processor identifier: not a number of 16 bits",
        ),
        ('{"fields": {"Guest RIP": 1, "Guest RIP": 2}}', "'Guest RIP' is there twice"),
        ('{"launch state": "active"}', "launch state: expected clear or launched"),
        ('{"instruction": 7}', "instruction: expected VMLAUNCH or VMRESUME"),
        ('{"shadow VMCS": 1}', "shadow VMCS: expected true or false"),
        ('{"about": 1}', "about: expected a string"),
        ('{"memory": {"here": 1}}', "address in memory: 'here' is not a number"),
        ('{"memory": {"0": "0x10000000000000000"}}', "memory at 0: not a number of 64 bits"),
    ],
)
def test_parse__refuses_in_one_line(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as refusal:
        parse(text, FULL)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_parse__refuses_a_field_the_processor_lacks() -> None:
    with pytest.raises(DocumentError) as refusal:
        parse('{"fields": {"EPT pointer": 0}}', OLD)
    assert str(refusal.value) == (
        "this processor has no field 'EPT pointer'; it exists on processors that allow the 1-setting of \"enable EPT\""
    )


@given(st.binary(max_size=200))
def test_parse__bytes_are_understood_or_refused(data: bytes) -> None:
    for text in (data, b'{"fields": ' + data + b"}"):
        try:
            parse(text, FULL)
        except DocumentError as refusal:
            assert "\n" not in str(refusal)


@given(st.dictionaries(st.sampled_from([each for each in FIELDS if not each.read_only]), st.integers(0, 2**64 - 1)))
def test_round_trip__through_json(values: dict[f.Field, int]) -> None:
    vmcs = Vmcs(FULL)
    for field, value in values.items():
        vmcs[field] = value
    assert parse(to_json(vmcs), FULL).vmcs.values == vmcs.values


def test_region__gives_the_vmcs_back() -> None:
    vmcs = long_mode_guest()
    document = from_region(vmcs.to_image(), FULL)
    assert document.vmcs.values == vmcs.values
    assert document.launching
    vmcs.launch_state = LaunchState.LAUNCHED
    assert from_region(vmcs.to_image() + bytes(4096), FULL).instruction == "VMRESUME"


def test_region__refuses_what_the_processor_would_not_load() -> None:
    with pytest.raises(DocumentError, match="neither a JSON object nor a VMCS region: 5 bytes, a region has 4096"):
        from_region(b"hello", FULL)
    with pytest.raises(DocumentError, match=f"revision identifier 0x7 is not this processor's, {REVISION:#x}"):
        from_region(Vmcs(OLD).to_image().ljust(4096, b"\0"), FULL)
