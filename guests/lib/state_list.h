/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A list of states in a Multiboot module, one after the other (README.md has the format): a magic number,
 * pieces of memory, bases that states are made from, and the states, each a base with changes to it.
 */
#ifndef STATE_LIST_H
#define STATE_LIST_H

#include <stdint.h>

#include "multiboot.h"

/* Puts the pieces of memory where they belong, and goes on to what follows them. */
typedef const uint64_t *place_memory_function(const uint64_t *pieces);

/* Runs the state of this number and prints how it ended; returns what follows its changes. */
typedef const uint64_t *run_state_function(uint64_t number, const uint64_t *memory, const uint64_t *base,
                                           const uint64_t *changes);

/* Prepares console, descriptors and interrupt controllers, and finds the list; what follows the magic number. */
const uint64_t *state_list_open(const struct multiboot_info *info, uint64_t magic);

/* Runs every state of the list. Guests, and page walks, may change memory: it is placed before each. */
void state_list_run(const uint64_t *list, place_memory_function *place_memory, run_state_function *run_state);

#endif
