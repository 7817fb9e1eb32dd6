/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One C function per privileged instruction.
 */
#ifndef CPU_H
#define CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_SIZE 4096ul

/* Register numbers as instructions and VM-exit information encode them. */
enum gpr { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, GPR_COUNT };

enum {
    CR0_PE = 1u << 0,
    CR0_ET = 1u << 4,
    CR0_NE = 1u << 5,
    CR0_PG = 1u << 31,
    CR4_PAE = 1u << 5,
    CR4_VMXE = 1u << 13,
    EFER_SCE = 1u << 0,
    EFER_LME = 1u << 8,
    EFER_LMA = 1u << 10,
    EFER_NXE = 1u << 11,
    RFLAGS_FIXED = 1u << 1,
    RFLAGS_CF = 1u << 0,
    RFLAGS_PF = 1u << 2,
    RFLAGS_AF = 1u << 4,
    RFLAGS_ZF = 1u << 6,
    RFLAGS_SF = 1u << 7,
    RFLAGS_OF = 1u << 11,
    DR6_RESET = 0xFFFF0FF0u,
};

enum vector { VECTOR_DB = 1, VECTOR_UD = 6, VECTOR_GP = 13, VECTOR_PF = 14 };

enum msr {
    IA32_FEATURE_CONTROL = 0x3A,
    IA32_SYSENTER_CS = 0x174,
    IA32_SYSENTER_ESP = 0x175,
    IA32_SYSENTER_EIP = 0x176,
    IA32_DEBUGCTL = 0x1D9,
    IA32_EFER = 0xC0000080,
    IA32_FS_BASE = 0xC0000100,
    IA32_GS_BASE = 0xC0000101,
};

struct cpuid_result {
    uint32_t eax, ebx, ecx, edx;
};

/* The operand of SGDT, LGDT, SIDT and LIDT in 64-bit mode. */
struct table_register {
    uint16_t limit;
    uint64_t base;
} __attribute__((packed));

static inline struct cpuid_result cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid_result r;
    __asm__ volatile("cpuid"
                     : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx)
                     : "a"(leaf), "c"(subleaf));
    return r;
}

static inline bool is_canonical(uint64_t address)
{
    return (uint64_t)((int64_t)(address << 16) >> 16) == address;
}

static inline uint64_t rdmsr(uint32_t msr)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (uint64_t)high << 32 | low;
}

static inline void wrmsr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port));
}

static inline void hlt(void)
{
    __asm__ volatile("hlt" ::: "memory");
}

#define DEFINE_CONTROL_REGISTER(name)                                                  \
    static inline uint64_t read_##name(void)                                           \
    {                                                                                  \
        uint64_t value;                                                                \
        __asm__ volatile("mov %%" #name ", %0" : "=r"(value)::"memory");               \
        return value;                                                                  \
    }                                                                                  \
    static inline void write_##name(uint64_t value)                                    \
    {                                                                                  \
        __asm__ volatile("mov %0, %%" #name ::"r"(value) : "memory");                  \
    }

DEFINE_CONTROL_REGISTER(cr0)
DEFINE_CONTROL_REGISTER(cr3)
DEFINE_CONTROL_REGISTER(cr4)
DEFINE_CONTROL_REGISTER(dr0)
DEFINE_CONTROL_REGISTER(dr1)
DEFINE_CONTROL_REGISTER(dr2)
DEFINE_CONTROL_REGISTER(dr3)
DEFINE_CONTROL_REGISTER(dr6)

static inline void write_cr2(uint64_t value)
{
    __asm__ volatile("mov %0, %%cr2" ::"r"(value));
}

static inline uint64_t read_dr7(void)
{
    uint64_t value;
    __asm__ volatile("mov %%dr7, %0" : "=r"(value));
    return value;
}

static inline struct table_register sgdt(void)
{
    struct table_register r;
    __asm__ volatile("sgdt %0" : "=m"(r));
    return r;
}

static inline struct table_register sidt(void)
{
    struct table_register r;
    __asm__ volatile("sidt %0" : "=m"(r));
    return r;
}

#endif
