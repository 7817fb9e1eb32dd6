/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The memory functions that the compiler may call even in freestanding code.
 */
#ifndef MEMORY_H
#define MEMORY_H

#include <stddef.h>

void *memcpy(void *to, const void *from, size_t count);
void *memset(void *to, int byte, size_t count);
int memcmp(const void *a, const void *b, size_t count);

#endif
