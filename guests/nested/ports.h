/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the three levels agree on. Two ports, so that L3 can ask each level below it for its
 * number: L2 intercepts the first and lets the second pass, which then reaches L1.
 */
#ifndef PORTS_H
#define PORTS_H

enum { PORT_ASK_L2 = 0x80, PORT_ASK_L1 = 0xED, PORT_NOBODY = 0xFF };

enum { CPUID_HYPERVISOR_LEAF = 0x40000000 };

#endif
