/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The guest: seven instructions that leave for the hypervisor, in 64-bit mode at ring 0.
 */

        .section .text
        .globl  svm_hello_guest
svm_hello_guest:
        mov     %cr3, %rax              # exit: MOV from CR3
        mov     %rax, %cr3              # exit: MOV to CR3
        mov     $0x40000000, %eax       # the CPUID leaf where hypervisors introduce themselves
        cpuid                           # exit: CPUID
        mov     %ebx, %eax
        out     %eax, $0x80             # exit: I/O; shows what CPUID answered
        mov     $0x3fe00000, %edi       # the guest's paging maps it, nested paging does not
        mov     (%rdi), %eax            # exit: nested page fault; then what the hypervisor put there
        vmmcall                         # exit: VMMCALL; shows what was there
1:      hlt                             # exit: HLT, the end
        jmp     1b

        .section .note.GNU-stack, "", @progbits
