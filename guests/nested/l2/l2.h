/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef L2_H
#define L2_H

#include <stdbool.h>
#include <stdint.h>

/* --- l3.c: the guest ----------------------------------------------------------------------- */

/* Only the EPT makes this guest-physical page exist: no memory of L2 has such an address. */
#define WINDOW_ADDRESS 0x20000000ul
enum { WINDOW_REPLY_OFFSET = 64 };
#define WINDOW_GREETING "written by L2"
#define WINDOW_REPLY "written by L3"

/* Ends with machine_exit(). `has_window`: an EPT is in use, so the window page can be tried. */
void l3_main(bool has_window) __attribute__((noreturn));

/* --- ept.c: L2's EPT for L3 ---------------------------------------------------------------- */

/* Identity-maps the memory that L2 itself has; returns the EPT pointer. */
uint64_t ept_build(void);

/* Answers an EPT violation: the first access maps the window page for reading, the first write
 * makes it writable. Ends the run when the address is not the window's. */
void ept_handle_violation(uint64_t guest_physical, uint64_t qualification);

/* The page behind the window. */
extern char window_page[4096];

#endif
