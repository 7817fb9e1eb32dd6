/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * enum vmx_status vm_enter(uint64_t gpr[16], bool resume)
 *
 * The VM entry and the VM exit are the two halves of one function call: the exit resumes at
 * vm_exit_point with RSP as it was at the entry, and returns from here to the caller.
 */

        .set HOST_RSP,          0x6C14
        .set VM_FAIL_INVALID,   1
        .set VM_FAIL_VALID,     2

        .section .text
        .globl  vm_enter, vm_exit_point
vm_enter:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        push    %rdi                            # gpr: found again at the top of the stack
        mov     $HOST_RSP, %eax
        vmwrite %rsp, %rax
        jbe     failed

        test    %sil, %sil                      # ZF decides below; MOV leaves it alone
        mov     0x00(%rdi), %rax
        mov     0x08(%rdi), %rcx
        mov     0x10(%rdi), %rdx
        mov     0x18(%rdi), %rbx
        mov     0x28(%rdi), %rbp                # 0x20 would be RSP: hardware loads it
        mov     0x30(%rdi), %rsi
        mov     0x40(%rdi), %r8
        mov     0x48(%rdi), %r9
        mov     0x50(%rdi), %r10
        mov     0x58(%rdi), %r11
        mov     0x60(%rdi), %r12
        mov     0x68(%rdi), %r13
        mov     0x70(%rdi), %r14
        mov     0x78(%rdi), %r15
        mov     0x38(%rdi), %rdi
        jnz     1f
        vmlaunch
        jmp     failed                          # only a failed entry comes here
1:      vmresume

failed:
        mov     $VM_FAIL_INVALID, %eax          # MOV leaves CF and ZF alone
        mov     $VM_FAIL_VALID, %ecx
        cmovz   %ecx, %eax
        jmp     2f

vm_exit_point:
        push    %rdi                            # the guest's; our gpr pointer is now below it
        mov     8(%rsp), %rdi
        mov     %rax, 0x00(%rdi)
        mov     %rcx, 0x08(%rdi)
        mov     %rdx, 0x10(%rdi)
        mov     %rbx, 0x18(%rdi)
        mov     %rbp, 0x28(%rdi)
        mov     %rsi, 0x30(%rdi)
        popq    0x38(%rdi)
        mov     %r8, 0x40(%rdi)
        mov     %r9, 0x48(%rdi)
        mov     %r10, 0x50(%rdi)
        mov     %r11, 0x58(%rdi)
        mov     %r12, 0x60(%rdi)
        mov     %r13, 0x68(%rdi)
        mov     %r14, 0x70(%rdi)
        mov     %r15, 0x78(%rdi)
        xor     %eax, %eax

2:      pop     %rdi
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .section .note.GNU-stack, "", @progbits
