/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Output through the first serial port, and the end of the run.
 *
 * Conversions: %s, %c, %u, %x, with an `l` for 64-bit numbers, a field width, and the flags `-`
 * (left) and `0`.
 */
#ifndef CONSOLE_H
#define CONSOLE_H

#include <stdint.h>

enum { PORT_COM1 = 0x3F8, PORT_DEBUG_EXIT = 0xF4 };
enum exit_status { STATUS_PASS = 0, STATUS_FAIL = 1 };

/* Each image defines its own: what say() and fail() put before a line. */
extern const char console_tag[];

void console_init(void);
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Prints the reason and ends the run with STATUS_FAIL. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Tells the machine the result through the debug-exit port; halts where there is no such port. */
void machine_exit(uint32_t status) __attribute__((noreturn));

#endif
