"""Guests that misbehave: the architectural result, the right status, no traceback, no hang."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tiny_guests import EXIT_EAX, PRIVATE, RunVtx, code, exit_with, multiboot

from vtx.bench.hypervisor import elf64
from vtx.machine import Machine
from vtx.x86.state import DescriptorTable, Segment

AT_2_MIB = 0x20_0000


def machine_with(program: bytes) -> Machine:
    """``program`` at 1000H is about to run in flat 32-bit protected mode, with a stack below 7000H."""
    machine = Machine(memory=1 << 20)
    machine.memory.write(0x1000, program)
    state = machine.cpu.state
    state.cr0 = 0x11
    state.segments = [Segment(0x10, 0, 0xFFFF_FFFF, 0xC093) for _ in range(6)]
    state.segments[1] = Segment(8, 0, 0xFFFF_FFFF, 0xC09B)
    state.rip, state.gpr[4] = 0x1000, 0x7000
    return machine


@pytest.mark.parametrize(
    ("value", "status", "qemu"), [(0, 0, 1), (1, 1, 3), (2, 2, 5), (0x7F, 0x7F, 0xFF), (0x100, 255, 1), (0x12C, 44, 89)]
)
def test_the_value_a_guest_writes__is_the_status(vtx: RunVtx, image: Path, value: int, status: int, qemu: int) -> None:
    image.write_bytes(multiboot(exit_with(value)))
    assert vtx("run", image).status == status
    assert vtx("run", "--exit-convention", "qemu", image).status == qemu


def test_the_command_line__reaches_the_guest(vtx: RunVtx, image: Path) -> None:
    image.write_bytes(
        multiboot(
            code("""\
8b 73 10                ; mov esi, [ebx + 16]
ac                      ; next: lodsb
84 c0                   ; test al, al
74 08                   ; jz end
66 ba f8 03             ; mov dx, 0x3f8
ee                      ; out dx, al
eb f4                   ; jmp next
90                      ; nop
31 c0                   ; end: xor eax, eax
""")
            + EXIT_EAX
        )
    )
    done = vtx("run", image, "one", "--memory", "16M", "--", "-two", "--three")
    assert done.status == 0
    assert done.stdout.decode() == f"{image} one -two --three"


def test_an_exception_without_idt__is_a_triple_fault(vtx: RunVtx, image: Path) -> None:
    image.write_bytes(multiboot(b"\x0f\x0b"))  # ud2
    done = vtx("run", image)
    assert done.status == 125
    assert done.last_line == "vtx: triple fault at 0x8:0x100020: #GP(0x43) during delivery of a double fault"


def test_code_that_a_guest_writes_beside_its_data__does_not_end_the_process(vtx: RunVtx, image: Path) -> None:
    """LOCK BT ECX, ECX, which the library cannot translate, in a page that changed between code and data before."""
    program = code("""\
b9 14 00 00 00          ; mov ecx, 20
bb 20 03 10 00          ; mov ebx, data
be 20 02 10 00          ; mov esi, returns
bf 20 04 10 00          ; mov edi, target
bc 00 00 20 00          ; mov esp, 0x200000
89 03                   ; next: mov [ebx], eax
ff d6                   ; call esi
46                      ; inc esi
49                      ; dec ecx
75 f8                   ; jnz next
c7 07 f0 0f a3 c9       ; mov dword ptr [edi], 0xc9a30ff0
ff e7                   ; jmp edi
""")
    image.write_bytes(multiboot(program.ljust(0x200, b"\x90") + b"\xc3" * 0x40 + bytes(0x400)))
    done = vtx("run", image)
    assert done.status == 125
    assert done.last_line == "vtx: triple fault at 0x8:0x100420: #GP(0x43) during delivery of a double fault"


def test_code_that_a_guest_writes_over_an_invalid_opcode__executes() -> None:
    """The instruction that stores stays translated together with the place where LOCK BT had to trap."""
    start = code("""\
bf 02 18 00 00          ; mov edi, 0x1802
ba f0 0f a3 c9          ; mov edx, 0xc9a30ff0
b9 02 00 00 00          ; mov ecx, 2
e9 ec 07 00 00          ; jmp 0x1800
""")
    handler = code("""\
49                      ; dec ecx
7f 07                   ; jg again
78 0d                   ; js bad
ba 90 90 90 90          ; mov edx, 0x90909090
c7 04 24 00 18 00 00    ; again: mov dword ptr [esp], 0x1800
cf                      ; iretd
b8 01 00 00 00          ; bad: mov eax, 1
""")
    machine = machine_with(start)
    memory, state = machine.memory, machine.cpu.state
    memory.write(0x1800, bytes.fromhex("8917f4f4f4f4") + exit_with(0))  # MOV [EDI], EDX
    memory.write(0x3000, handler + EXIT_EAX)
    memory.write_u64(0x4008, 0x00CF_9B00_0000_FFFF)
    memory.write_u64(0x5000 + 8 * 6, 0x0000_8E00_0008_3000)
    state.gdtr, state.idtr = DescriptorTable(0x4000, 0x1F), DescriptorTable(0x5000, 0x7F)
    machine.cpu.load_control_state()
    assert machine.run(max_instructions=1000).exit_value == 0


def test_json__has_the_reason_too(vtx: RunVtx, image: Path) -> None:
    image.write_bytes(multiboot(b"\x0f\x0b"))
    done = vtx("run", "--json", image)
    summary = json.loads(done.stderr)
    assert (summary["reason"], summary["status"], done.status) == ("shutdown", 125, 125)
    assert summary["message"].startswith("triple fault")
    assert summary["exit_value"] is None


def test_halted_with_interrupts_off__ends_at_once(vtx: RunVtx, image: Path) -> None:
    image.write_bytes(multiboot(b"\xfa\xf4"))  # cli; hlt
    done = vtx("run", image)
    assert done.status == 125
    assert "halted" in done.last_line


@pytest.mark.parametrize("target", [0xDEAD_0000, 0xFFFF_FFF0, 0xFFFF_FFFF, 0x0800_0000, 0xFEE0_0000], ids=hex)
def test_a_jump_into_nowhere__is_a_triple_fault(vtx: RunVtx, image: Path, target: int) -> None:
    image.write_bytes(multiboot(b"\xb8" + target.to_bytes(4, "little") + b"\xff\xe0"))  # mov eax; jmp eax
    done = vtx("run", image, "--max-instructions", "10000000", "--timeout", "20")
    assert done.status == 125, done.stderr
    assert "triple fault" in done.last_line


def test_a_jump_to_the_last_byte_of_ram__runs_off_its_end(vtx: RunVtx, image: Path) -> None:
    program = code("""\
c6 05 ff ff ff 07 90    ; mov byte [0x7ffffff], 0x90
b8 ff ff ff 07          ; mov eax, 0x7ffffff
ff e0                   ; jmp eax
""")
    image.write_bytes(multiboot(program))
    done = vtx("run", image, "--memory", "128M")
    assert done.status == 125
    assert "0x8000000" in done.last_line


SELF_MODIFYING = {
    "the next instruction": code("""\
c6 05 28 00 10 00 2a    ; mov byte [0x100028], 0x2a
b8 01 00 00 00          ; mov eax, 1
"""),
    "each pass of a loop": code("""\
b9 2a 00 00 00          ; mov ecx, 0x2a
ff 05 2c 00 10 00       ; pass: inc dword [0x10002c]
b8 00 00 00 00          ; mov eax, 0
49                      ; dec ecx
75 f2                   ; jnz pass
"""),
    "what it has run before, far away": code("""\
31 db                   ; xor ebx, ebx
bf 00 00 20 00          ; mov edi, 0x200000
c6 07 b8                ; mov byte [edi], 0xb8 (mov eax, imm32)
c7 47 01 01 00 00 00    ; mov dword [edi + 1], 1
c6 47 05 c3             ; mov byte [edi + 5], 0xc3 (ret)
ff d7                   ; call edi
01 c3                   ; add ebx, eax
c6 47 01 29             ; mov byte [edi + 1], 0x29
ff d7                   ; call edi
01 d8                   ; add eax, ebx
"""),
}


@pytest.mark.parametrize("program", SELF_MODIFYING.values(), ids=SELF_MODIFYING)
def test_a_guest_that_rewrites_its_code__runs_the_new_code(vtx: RunVtx, image: Path, program: bytes) -> None:
    image.write_bytes(multiboot(program + EXIT_EAX))
    assert vtx("run", image).status == 0x2A


# RDX = the page directory of the first GiB, as the loader of ELF64 images builds it.
FIND_PAGE_DIRECTORY = code("""\
0f 20 db                ; mov rbx, cr3
48 8b 0b                ; mov rcx, [rbx]
48 81 e1 00 f0 ff ff    ; and rcx, -4096
48 8b 11                ; mov rdx, [rcx]
48 81 e2 00 f0 ff ff    ; and rdx, -4096
""")
# Map linear 0x7e00000, 2 MiB, to the address in RAX.
MAP_RAX = code("""\
48 89 82 f8 01 00 00    ; mov [rdx + 0x1f8], rax
0f 20 d8                ; mov rax, cr3
0f 22 d8                ; mov cr3, rax
48 c7 c6 00 00 e0 07    ; mov rsi, 0x7e00000
""")


def run_64(vtx: RunVtx, image: Path, program: bytes, *options: object):  # type: ignore[no-untyped-def]
    image.write_bytes(elf64({AT_2_MIB: program}))
    return vtx("run", image, "--timeout", "20", *options)


def test_code_rewritten_through_another_linear_address__runs_the_new_code(vtx: RunVtx, image: Path) -> None:
    before = FIND_PAGE_DIRECTORY + code("48 c7 c0 83 00 20 00 ; mov rax, 0x200083") + MAP_RAX
    patched = len(before) + 5 + 1  # the immediate of mov eax
    program = before + code(f"""\
b9 02 00 00 00          ; mov ecx, 2
b8 01 00 00 00          ; pass: mov eax, 1
c6 86 {patched.to_bytes(4, "little").hex(" ")} 2a ; mov byte [rsi + patched], 0x2a
ff c9                   ; dec ecx
75 f0                   ; jnz pass
""")
    assert run_64(vtx, image, program + EXIT_EAX).status == 0x2A


def test_private_memory_of_the_engine__is_not_there_for_the_guest(vtx: RunVtx, image: Path) -> None:
    entry = code(f"48 b8 {(PRIVATE | 0x83).to_bytes(8, 'little').hex(' ')} ; mov rax, PRIVATE | 0x83")
    check = code("""\
48 8b 06                ; mov rax, [rsi]
48 83 f8 ff             ; cmp rax, -1
75 11                   ; jne bad
48 c7 06 44 33 22 11    ; mov qword [rsi], 0x11223344
48 83 3e ff             ; cmp qword [rsi], -1
75 04                   ; jne bad
31 c0                   ; xor eax, eax
eb 05                   ; jmp end
b8 01 00 00 00          ; bad: mov eax, 1
""")
    done = run_64(vtx, image, FIND_PAGE_DIRECTORY + entry + MAP_RAX + check + EXIT_EAX)
    assert done.status == 0, done.stderr


def test_code_in_private_memory__is_no_code(vtx: RunVtx, image: Path) -> None:
    entry = code(f"48 b8 {(PRIVATE | 0x83).to_bytes(8, 'little').hex(' ')} ; mov rax, PRIVATE | 0x83")
    done = run_64(vtx, image, FIND_PAGE_DIRECTORY + entry + MAP_RAX + code("ff e6 ; jmp rsi"))
    assert done.status == 125
    assert "triple fault" in done.last_line


@pytest.mark.parametrize("root", [PRIVATE, 0xF000_0000, 0x0800_0000, 1 << 46], ids=hex)
def test_page_tables_where_no_ram_is__fault(vtx: RunVtx, image: Path, root: int) -> None:
    program = code(f"""\
48 b8 {root.to_bytes(8, "little").hex(" ")} ; mov rax, root
0f 22 d8                ; mov cr3, rax
90                      ; nop
""")
    done = run_64(vtx, image, program)
    assert done.status == 125
    assert "triple fault" in done.last_line


def test_page_tables_of_32_bit_paging_where_no_ram_is__fault(vtx: RunVtx, image: Path) -> None:
    program = code("""\
b8 00 00 00 f0          ; mov eax, 0xf0000000
0f 22 d8                ; mov cr3, eax
0f 20 c0                ; mov eax, cr0
0d 00 00 00 80          ; or eax, 0x80000000
0f 22 c0                ; mov cr0, eax
90                      ; nop
""")
    image.write_bytes(multiboot(program))
    assert vtx("run", image, "--timeout", "20").status == 125


ENDLESS = {
    "a jump to itself": b"\xeb\xfe",
    "a trap for ever": code("0f a2 eb fc          ; again: cpuid; jmp again"),
    "a port for ever": code("e4 80 eb fc          ; again: in al, 0x80; jmp again"),
    "a repeated store": code("""\
bf 00 00 00 02          ; mov edi, 0x2000000
b9 ff ff ff ff          ; again: mov ecx, -1
f3 aa                   ; rep stosb
eb f7                   ; jmp again
"""),
    "its own code for ever": code("""\
fe 05 27 00 10 00       ; again: inc byte [0x100027]
b0 00                   ; mov al, 0
eb f6                   ; jmp again
"""),
    "output for ever": code("""\
66 ba f8 03             ; mov dx, 0x3f8
b0 2e                   ; mov al, '.'
ee                      ; again: out dx, al
eb fd                   ; jmp again
"""),
}


@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_guest__is_stopped_by_the_time_out(vtx: RunVtx, image: Path, program: bytes) -> None:
    image.write_bytes(multiboot(program))
    start = time.monotonic()
    done = vtx("run", image, "--timeout", "0.3")
    assert time.monotonic() - start < 10
    assert done.status == 124
    assert done.last_line == "vtx: stopped after 0.3 seconds"


@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_guest__is_stopped_by_the_limit_of_instructions(vtx: RunVtx, image: Path, program: bytes) -> None:
    image.write_bytes(multiboot(program))
    done = vtx("run", "--json", image, "--max-instructions", "20000")
    assert done.status == 124
    summary = json.loads(done.stderr)
    assert summary["reason"] == "instruction limit"
    assert summary["instructions"] == 20_000


def test_ports__in_every_size_give_an_answer(vtx: RunVtx, image: Path) -> None:
    """The first 4096 ports but the debug-exit port, and the last one; nothing answers at most of them."""
    program = code("""\
31 d2                   ; xor edx, edx
81 fa f4 00 00 00       ; next: cmp edx, 0xf4
72 08                   ; jb use
81 fa f8 00 00 00       ; cmp edx, 0xf8
72 09                   ; jb skip
ec                      ; use: in al, dx
66 ed                   ; in ax, dx
ed                      ; in eax, dx
ee                      ; out dx, al
66 ef                   ; out dx, ax
ef                      ; out dx, eax
90                      ; nop
42                      ; skip: inc edx
81 fa 00 10 00 00       ; cmp edx, 0x1000
75 de                   ; jne next
ba ff ff 00 00          ; mov edx, 0xffff
66 ef                   ; out dx, ax
ef                      ; out dx, eax
66 ed                   ; in ax, dx
ed                      ; in eax, dx
40                      ; inc eax (all ones from where nothing is)
""")
    image.write_bytes(multiboot(program + EXIT_EAX))
    done = vtx("run", image, "--timeout", "120")
    assert done.status == 0, done.stderr
