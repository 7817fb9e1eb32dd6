/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * void svm_run(uint64_t vmcb_physical, uint64_t gpr[16])
 *
 * VMRUN is one instruction that ends when the guest exits: RIP, RSP and RAX are then the host's
 * again, and everything else is the guest's until it is swapped back.
 */

        .section .text
        .globl  svm_run
svm_run:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        push    %rsi                            # gpr: found again at the top of the stack
        mov     %rdi, %rax

        mov     0x08(%rsi), %rcx
        mov     0x10(%rsi), %rdx
        mov     0x18(%rsi), %rbx
        mov     0x28(%rsi), %rbp                # 0x20 would be RSP: hardware loads it
        mov     0x38(%rsi), %rdi
        mov     0x40(%rsi), %r8
        mov     0x48(%rsi), %r9
        mov     0x50(%rsi), %r10
        mov     0x58(%rsi), %r11
        mov     0x60(%rsi), %r12
        mov     0x68(%rsi), %r13
        mov     0x70(%rsi), %r14
        mov     0x78(%rsi), %r15
        mov     0x30(%rsi), %rsi

        clgi                                    # nothing may come between this and the guest ...
        vmrun   %rax                            # ... which runs with GIF = 1, and exits with GIF = 0
        stgi

        push    %rsi                            # the guest's; our gpr pointer is now below it
        mov     8(%rsp), %rsi
        mov     %rcx, 0x08(%rsi)
        mov     %rdx, 0x10(%rsi)
        mov     %rbx, 0x18(%rsi)
        mov     %rbp, 0x28(%rsi)
        popq    0x30(%rsi)
        mov     %rdi, 0x38(%rsi)
        mov     %r8, 0x40(%rsi)
        mov     %r9, 0x48(%rsi)
        mov     %r10, 0x50(%rsi)
        mov     %r11, 0x58(%rsi)
        mov     %r12, 0x60(%rsi)
        mov     %r13, 0x68(%rsi)
        mov     %r14, 0x70(%rsi)
        mov     %r15, 0x78(%rsi)

        pop     %rsi
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .section .note.GNU-stack, "", @progbits
