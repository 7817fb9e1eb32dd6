/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The handler of debug exceptions: it counts them.
 */

        .section .text
        .globl  debug_handler
debug_handler:
        incq    debug_exceptions
        iretq

        .section .note.GNU-stack, "", @progbits
