/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One 16-byte stub per exception vector; each leaves the same frame for unexpected_exception().
 */

        .set HAVE_ERROR_CODE, 0x60227D00        # vectors 8, 10-14, 17, 21, 29 and 30

        .section .text
        .balign 16
        .globl  exception_stubs
exception_stubs:
        .set    vector, 0
        .rept   32
        .balign 16
        .if     (HAVE_ERROR_CODE >> vector) & 1
        .else
        push    $0
        .endif
        push    $vector
        jmp     exception_common
        .set    vector, vector + 1
        .endr

        .balign 16
exception_common:
        cld
        mov     %rsp, %rdi
        and     $-16, %rsp
        call    unexpected_exception

        .section .note.GNU-stack, "", @progbits
