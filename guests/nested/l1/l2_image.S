/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The image that L1 boots, as a file inside its own.
 */
        .section .rodata
        .balign 16
        .globl  l2_image, l2_image_end
l2_image:
        .incbin "nested-l2.elf"
l2_image_end:

        .section .note.GNU-stack, "", @progbits
