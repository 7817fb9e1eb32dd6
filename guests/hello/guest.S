/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The guest: six instructions that leave for the hypervisor, in 64-bit mode at ring 0.
 */

        .section .text
        .globl  hello_guest
hello_guest:
        mov     %cr3, %rax              # exit: MOV from CR3
        mov     %rax, %cr3              # exit: MOV to CR3
        mov     $0x40000000, %eax       # the CPUID leaf where hypervisors introduce themselves
        cpuid                           # exit: CPUID
        mov     %ebx, %eax
        out     %eax, $0x80             # exit: I/O; shows what CPUID answered
1:      hlt                             # exit: HLT, the end
        jmp     1b

        .section .note.GNU-stack, "", @progbits
