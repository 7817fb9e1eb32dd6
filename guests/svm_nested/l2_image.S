/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The hypervisor that L1 runs, as a file inside its own: svm_hello, unchanged.
 */
        .section .rodata
        .balign 16
        .globl  l2_image, l2_image_end
l2_image:
        .incbin "svm_hello.elf"
l2_image_end:

        .section .note.GNU-stack, "", @progbits
