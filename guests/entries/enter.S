/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * enum vmx_status enter_once(void)
 *
 * VMLAUNCH with a guest whose general-purpose registers are all zero. A VM exit comes back here with no register to rely
 * on: RSP, too, is what the VMCS said.
 */

        .set VM_FAIL_INVALID,   1
        .set VM_FAIL_VALID,     2

        .section .text
        .globl  enter_once, after_vm_exit
enter_once:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, saved_rsp

        .irp    register, eax, ebx, ecx, edx, esi, edi, ebp, r8d, r9d, r10d, r11d, r12d, r13d, r14d, r15d
        xor     %\register, %\register
        .endr
        vmlaunch

        /* Only a failed entry comes here. MOV leaves CF and ZF alone. */
        mov     $VM_FAIL_INVALID, %eax
        mov     $VM_FAIL_VALID, %ecx
        cmovz   %ecx, %eax
        jmp     1f

after_vm_exit:
        xor     %eax, %eax                      # VM_SUCCEED
        mov     saved_rsp, %rsp

1:      pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .section .data
        .balign 8
        .globl  host_rsp
host_rsp:                       .quad exit_stack_top

        .section .bss
        .balign 16
saved_rsp:                      .skip 16
exit_stack:                     .skip 1024
exit_stack_top:

        .section .note.GNU-stack, "", @progbits
