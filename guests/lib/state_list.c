/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "state_list.h"

#include "console.h"
#include "cpu.h"
#include "descriptors.h"

enum { MOST_BASES = 64 };
enum { PORT_PIC_MASTER_MASK = 0x21, PORT_PIC_SLAVE_MASK = 0xA1, ALL_MASKED = 0xFF };

const uint64_t *state_list_open(const struct multiboot_info *info, uint64_t magic)
{
    console_init();
    descriptors_init();
    outb(PORT_PIC_MASTER_MASK, ALL_MASKED);     /* no interrupt but those that a state asks for */
    outb(PORT_PIC_SLAVE_MASK, ALL_MASKED);
    if (!(info->flags & MULTIBOOT_INFO_MODULES) || !info->module_count)
        fail("there is no module\n");

    const struct multiboot_module *module = (const void *)(uint64_t)info->modules;
    const uint64_t *list = (const void *)(uint64_t)module->start;

    if (*list++ != magic)
        fail("the module is not a list of states for this program\n");
    return list;
}

void state_list_run(const uint64_t *list, place_memory_function *place_memory, run_state_function *run_state)
{
    static const uint64_t *bases[MOST_BASES];
    const uint64_t *memory = list;

    list = place_memory(memory);
    uint64_t first = *list++, base_count = *list++;
    if (base_count > MOST_BASES)
        fail("%lu bases are too many\n", base_count);
    for (uint64_t base = 0; base < base_count; base++) {
        bases[base] = list;
        list += 1 + 2 * *list;
    }
    uint64_t count = *list++;
    for (uint64_t number = first; number < first + count; number++) {
        uint64_t base = *list++;

        if (base >= base_count)
            fail("state %lu: there is no base %lu\n", number, base);
        place_memory(memory);
        list = run_state(number, memory, bases[base], list);
    }
    print("end\n");
}
