"""What the harness prints of a VMRUN, and what of it is compared."""

from vmcs.vmcb.fields import BY_NAME, VmcbField
from vtx.cli.images import find_image
from vtx.fuzz import compare
from vtx.fuzz.drawing import State
from vtx.fuzz.on_vtx import on_vtx
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.experiment import IMAGE, ORACLES, experiment
from vtx.fuzz.vmruns.programs import PROGRAMS, SLOT
from vtx.fuzz.vmruns.results import Result, differences, observed, result_of
from vtx.x86.state import Gpr

ORACLE = ORACLES["bochs"]
GENERATOR = ORACLE.generator(1)
VMRUNS = experiment(GENERATOR)
NAMES = [base.name for base in scene.BASES]
INVALID = Result("exit", (1 << 64) - 1)
VMMCALL, CPUID, IOIO, PAGE_FAULT = 0x81, 0x72, 0x7B, 0x4E


def state(base: str = "64-bit", program: str = "nothing", changes: dict[VmcbField, int] | None = None) -> State:
    number = next(n for n, each in enumerate(PROGRAMS) if each.name == program)
    origin = scene.BASES[NAMES.index(base)].origin
    fields = {scene.RIP: origin + number * SLOT, **(changes or {})}
    fields |= {scene.REGISTERS[register]: value for register, value in PROGRAMS[number].registers.items()}
    if PROGRAMS[number].memory is not None:
        fields |= {scene.REGISTERS[each]: origin + PROGRAMS[number].memory for each in (Gpr.RBX, Gpr.RSI, Gpr.RDI)}
    return State(NAMES.index(base), tuple((field.encoding, value) for field, value in fields.items()))


def run(*states: State) -> list[Result]:
    image = find_image(IMAGE).data
    results, _ = compare.run(VMRUNS, states, lambda blob: on_vtx(GENERATOR.profile, image, blob))
    return [results[number] for number in range(len(states))]


def test_a_line() -> None:
    assert result_of("exit", [0x7B, 1, 2, 0, 0x578, 7, 0x281_8000, 5]) == Result(
        "exit", 0x7B, 1, 2, 0, ((0x578, 7), (0x281_8000, 5))
    )
    assert result_of("exit", [0xFFFF_FFFF, 0, 0, 0]) == INVALID  # QEMU writes 32 bits


def test_what_is_compared() -> None:
    inputs = GENERATOR.fields(state())
    one = Result("exit", VMMCALL, 7, 8, 0x31, ((0x570, 6), (0x578, 7), (0xA8, 0x31), (0x1018, 3)))
    seen = observed(one, inputs, ())
    assert "EXITINFO1" not in seen  # it has none
    assert seen["EXITINTINFO"] == seen["EVENTINJ"] == 0  # not valid
    assert (seen["RFLAGS"], seen["RIP"], seen["RBX"]) == (6, 7, 3)
    assert seen["CR3"] == scene.PML4
    other = Result("exit", VMMCALL, 0, 0, 0, ((0x570, 6), (0x1018, 4), (scene.STACK, 9)))
    assert differences(seen, observed(other, inputs, ())) == {"RIP", "RBX", f"[{scene.STACK:#x}]"}
    assert differences(seen, observed(INVALID, inputs, ())) == {"EXITCODE"}


def test_the_bases_on_the_model() -> None:
    results = run(*(State(number, ()) for number in range(len(NAMES))))
    assert {name: result.name for name, result in zip(NAMES, results, strict=True)} == dict.fromkeys(NAMES, "VMMCALL")


def test_programs_on_the_model() -> None:
    intercept = {scene.INTERCEPTS[2]: 0xFFFF_FFFF}
    cpuid, port, fault, invalid, real = run(
        state(program="CPUID", changes={scene.INTERCEPTS[3]: 1 << 31 | 0xFFFF_FFFF}),
        state(program="OUT 60H, EAX"),
        state(program="a store to read-only data", changes=intercept),
        state(changes={BY_NAME["guest ASID"]: 0}),
        state("real mode", "INT3", {BY_NAME["IDTR base"]: scene.IDT_16}),
    )
    assert cpuid.code == CPUID
    assert (port.code, port.info1 & 0xFFFF_0071, port.info2) == (IOIO, 0x60_0040, dict(port.changed)[0xC8])
    assert (fault.code, fault.info1, fault.info2) == (PAGE_FAULT, 3, scene.READ_ONLY + 0x10)
    assert invalid == INVALID
    assert dict(real.changed)[0x578] == scene.HANDLERS - scene.CODE + 3 * 16


def test_an_instruction_of_the_guest_ends_its_interrupt_shadow() -> None:
    shadow = {BY_NAME["interrupt state"]: 1}
    (stays, *ended) = run(*(state(program=name, changes=shadow) for name in ("nothing", "SLDT", "CLI")))
    assert scene.INTERRUPT_STATE.offset not in dict(stays.changed)
    assert [dict(result.changed)[scene.INTERRUPT_STATE.offset] for result in ended] == [0, 0]


def test_intercepts_that_come_before_faults() -> None:
    swint = {scene.INTERCEPTS[3]: 1 << 31 | 0x1920_0000}
    results = run(
        state("real mode", "INSB", {BY_NAME["ES limit"]: 0}),
        state("compatibility mode", "INSW or INSD", {BY_NAME["ES attributes"]: 0xC91}),
        state("virtual-8086 mode", "INT 30H", swint),  # at an I/O privilege level of 0
    )
    assert [result.name for result in results] == ["I/O instruction", "I/O instruction", "software interrupt"]


def test_int_n_that_virtual_8086_mode_forbids_is_not_being_delivered() -> None:
    (result,) = run(state("virtual-8086 mode", "INT 30H", {scene.INTERCEPTS[2]: 0xFFFF_FFFF}))
    assert (result.name, result.info1, result.interrupted) == ("exception #GP", 0, 0)
