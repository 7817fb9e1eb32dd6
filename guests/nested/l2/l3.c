/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L3: the innermost guest, 64-bit code at ring 0. It prints on the serial port directly (every
 * level below lets COM1 pass) and otherwise does what makes a hypervisor work.
 */
#include "../ports.h"
#include "console.h"
#include "cpu.h"
#include "l2.h"
#include "memory.h"

static bool processor_is_level_2(void)
{
    struct cpuid_result r = cpuid(CPUID_HYPERVISOR_LEAF, 0);
    char signature[13] = {0};

    memcpy(signature, &r.ebx, 4);
    memcpy(signature + 4, &r.ecx, 4);
    memcpy(signature + 8, &r.edx, 4);
    print("[L3] CPUID says \"%s\"\n", signature);
    return memcmp(signature, "I am level 2", 12) == 0;
}

static bool ports_are_answered(void)
{
    uint8_t from_l2 = inb(PORT_ASK_L2), from_l1 = inb(PORT_ASK_L1);

    print("[L3] port 0x%x answers %u, port 0x%x answers %u\n", PORT_ASK_L2, from_l2, PORT_ASK_L1, from_l1);
    return from_l2 == 2 && (from_l1 == 1 || from_l1 == PORT_NOBODY);
}

static bool window_works(void)
{
    char *window = (char *)WINDOW_ADDRESS, *reply = window + WINDOW_REPLY_OFFSET;
    bool greeted = memcmp(window, WINDOW_GREETING, sizeof WINDOW_GREETING) == 0;

    memcpy(reply, WINDOW_REPLY, sizeof WINDOW_REPLY);
    print("[L3] at guest-physical 0x%lx: \"%s\", \"%s\"\n", WINDOW_ADDRESS, window, reply);
    return greeted;
}

void l3_main(bool has_window)
{
    bool good = true;

    print("[L3] running at ring 0 with CR3 = 0x%lx\n", read_cr3());
    write_cr3(read_cr3());
    good &= processor_is_level_2();
    good &= ports_are_answered();
    if (has_window)
        good &= window_works();
    hlt();
    print("[L3] woken from HLT; %s\n", good ? "all is as it should be" : "something is WRONG");
    machine_exit(good ? STATUS_PASS : STATUS_FAIL);
}
