/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The control block of AMD-V and the steps every SVM hypervisor takes, in the manual's words.
 * Whatever fails prints what and ends the run.
 */
#ifndef SVM_H
#define SVM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu.h"

enum { MSR_VM_CR = 0xC0010114, MSR_VM_HSAVE_PA = 0xC0010117 };
enum { VM_CR_SVMDIS = 1u << 4, EFER_SVME = 1u << 12 };
enum { CPUID_SVM_NESTED_PAGING = 1u << 0, CPUID_SVM_NEXT_RIP = 1u << 3 };

/* EXITCODE; an intercept's code is also its number. Spec: APM volume 2, "SVM Intercept Exit Codes". */
enum svm_exit {
    SVM_EXIT_CR3_READ = 0x03,
    SVM_EXIT_CR3_WRITE = 0x13,
    SVM_EXIT_CPUID = 0x72,
    SVM_EXIT_HLT = 0x78,
    SVM_EXIT_IOIO = 0x7B,
    SVM_EXIT_MSR = 0x7C,
    SVM_EXIT_SHUTDOWN = 0x7F,
    SVM_EXIT_VMRUN = 0x80,
    SVM_EXIT_VMMCALL = 0x81,
    SVM_EXIT_VMLOAD = 0x82,
    SVM_EXIT_VMSAVE = 0x83,
    SVM_EXIT_STGI = 0x84,
    SVM_EXIT_CLGI = 0x85,
    SVM_EXIT_NPF = 0x400,
};
#define SVM_EXIT_INVALID (~0ul)

/* EXITINFO1 of an exit due to an I/O instruction. */
#define SVM_IO_PORT(info) ((uint16_t)((info) >> 16))
#define SVM_IO_IS_IN(info) ((bool)((info)&1))
#define SVM_IO_IS_32_BITS(info) ((bool)((info) >> 6 & 1))

/* EXITINFO1 of an exit due to MOV to or from a control register, with decode assists. */
#define SVM_CR_IS_MOV(info) ((bool)((info) >> 63))
#define SVM_CR_REGISTER(info) ((enum gpr)((info)&15))

/* EXITINFO1 of a nested page fault: the error code of the nested walk, and what was being translated. */
enum { SVM_NPF_PRESENT = 1u << 0, SVM_NPF_WRITE = 1u << 1, SVM_NPF_USER = 1u << 2 };
#define SVM_NPF_FINAL (1ul << 32)

/* Segment attributes as the control block holds them. */
enum { SVM_ATTRIBUTES_CODE64 = 0x29B, SVM_ATTRIBUTES_DATA = 0xC93 };

enum { SVM_NESTED_PAGING = 1u << 0 };

struct vmcb_segment {
    uint16_t selector, attributes;
    uint32_t limit;
    uint64_t base;
};

/* Spec: APM volume 2, "Layout of VMCB". */
struct vmcb {
    uint32_t intercepts[6];
    uint8_t reserved_018[0x40 - 0x18];
    uint64_t iopm_base, msrpm_base, tsc_offset;
    uint32_t asid;
    uint8_t tlb_control, reserved_05d[3];
    uint64_t virtual_interrupts, interrupt_state;
    uint64_t exit_code, exit_info1, exit_info2, exit_int_info;
    uint64_t nested_control;
    uint8_t reserved_098[0xA8 - 0x98];
    uint64_t event_injection, n_cr3, extensions;
    uint64_t clean_bits;
    uint64_t next_rip;
    uint8_t reserved_0d0[0x400 - 0xD0];
    struct vmcb_segment es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr;
    uint8_t reserved_4a0[0x4CB - 0x4A0];
    uint8_t cpl, reserved_4cc[4];
    uint64_t efer;
    uint8_t reserved_4d8[0x548 - 0x4D8];
    uint64_t cr4, cr3, cr0, dr7, dr6, rflags, rip;
    uint8_t reserved_580[0x5D8 - 0x580];
    uint64_t rsp;
    uint8_t reserved_5e0[0x5F8 - 0x5E0];
    uint64_t rax;
    uint8_t reserved_600[0x668 - 0x600];
    uint64_t g_pat;
    uint8_t reserved_670[0x1000 - 0x670];
} __attribute__((packed, aligned(4096)));

_Static_assert(sizeof(struct vmcb) == PAGE_SIZE, "a control block is a page");
_Static_assert(offsetof(struct vmcb, exit_code) == 0x070, "the manual's offset");
_Static_assert(offsetof(struct vmcb, n_cr3) == 0x0B0, "the manual's offset");
_Static_assert(offsetof(struct vmcb, efer) == 0x4D0, "the manual's offset");
_Static_assert(offsetof(struct vmcb, rip) == 0x578, "the manual's offset");
_Static_assert(offsetof(struct vmcb, g_pat) == 0x668, "the manual's offset");

/* Switches SVM on; ends the run if the processor has none, or not all of ``features`` (CPUID 8000_000AH EDX). */
void svm_enable(uint32_t features);

/* A 64-bit guest at ring 0 with the host's paging, descriptor tables and everything else that can be shared. */
void vmcb_create(struct vmcb *vmcb, uint64_t rip, uint64_t rsp);

/* Turns an intercept on. */
void vmcb_intercept(struct vmcb *vmcb, enum svm_exit number);

/* Runs the guest until it exits; ``gpr`` has its registers but RAX and RSP, which are in the control block. */
void svm_run(uint64_t vmcb_physical, uint64_t gpr[GPR_COUNT]);

const char *svm_exit_name(uint64_t code);

#endif
