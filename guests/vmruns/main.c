/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * vmruns: VMRUN of a list of control blocks, and how each one ended.
 *
 * The list is a Multiboot module (README.md has its format). Nothing in it is taken to be valid: a
 * VMEXIT_INVALID is as good a result as a guest that runs.
 */
#include "console.h"
#include "cpu.h"
#include "descriptors.h"
#include "memory.h"
#include "state_list.h"
#include "svm.h"

const char console_tag[] = "[vmruns] ";

enum { MAGIC = 0x5345545442434D56 };                    /* "VMCBTTES" in memory */
enum { PLACE_SIZE_SHIFT = 32, WORD = sizeof(uint64_t) };

/* What one line of the list is about: the control block, and the registers that it does not hold. Then signs of a
   processor that is not back in its host as it should be: debug exceptions, which are a guest's; control registers. */
static struct guest {
    struct vmcb vmcb;
    uint64_t gpr[GPR_COUNT];
    uint64_t debug_exceptions;
    uint64_t host_cr0, host_cr4, host_efer;
} guest, before;

/* debug.S */
extern const uint8_t debug_handler[];
uint64_t debug_exceptions;

static struct vmcb host;                                /* what VMLOAD brings back */

static const struct {
    uint32_t leaf, subleaf;
} leaves[] = {{1, 0}, {7, 0}, {0x80000001, 0}, {0x80000007, 0}, {0x80000008, 0}, {0x8000000A, 0}};

/* So that whoever compares two processors knows whether they are the same. */
static void print_processor(void)
{
    for (size_t i = 0; i < sizeof leaves / sizeof leaves[0]; i++) {
        struct cpuid_result r = cpuid(leaves[i].leaf, leaves[i].subleaf);

        print("cpuid %x %x %x %x %x\n", leaves[i].leaf, r.eax, r.ebx, r.ecx, r.edx);
    }
}

/* A piece of memory in the list. */
struct piece {
    uint64_t *address;
    uint64_t words;
    bool watched;
    const uint64_t *contents;
};

/* Reads a piece; returns what follows it. */
static const uint64_t *read_piece(const uint64_t *list, struct piece *piece)
{
    *piece = (struct piece){(uint64_t *)list[0], list[1] / WORD, list[2] != 0, list + 3};
    return piece->contents + piece->words;
}

/* Copies pieces of memory to where the list says; returns what follows. */
static const uint64_t *place_memory(const uint64_t *list)
{
    for (uint64_t count = *list++; count; count--) {
        struct piece piece;

        list = read_piece(list, &piece);
        __asm__ volatile("rep movsq" : "+D"(piece.address), "+S"(piece.contents), "+c"(piece.words)::"memory");
    }
    return list;
}

/* Writes what the list says into the control block and the registers; returns what follows. */
static const uint64_t *write_fields(const uint64_t *list)
{
    for (uint64_t count = *list++; count; count--, list += 2) {
        uint32_t offset = (uint32_t)list[0];
        uint64_t size = list[0] >> PLACE_SIZE_SHIFT;

        if (offset + size > offsetof(struct guest, debug_exceptions) || size > WORD)
            fail("no field can be at 0x%lx\n", list[0]);
        memcpy((uint8_t *)&guest + offset, &list[1], size);
    }
    return list;
}

static void vmload(struct vmcb *vmcb)
{
    __asm__ volatile("vmload %0" ::"a"(vmcb) : "memory");
}

static void vmsave(struct vmcb *vmcb)
{
    __asm__ volatile("vmsave %0" ::"a"(vmcb) : "memory");
}

static void read_control_registers(struct guest *into)
{
    into->host_cr0 = read_cr0();
    into->host_cr4 = read_cr4();
    into->host_efer = rdmsr(IA32_EFER);
}

static void run_guest(void)
{
    write_dr0(0);
    write_dr1(0);
    write_dr2(0);
    write_dr3(0);
    write_dr6(DR6_RESET);
    debug_exceptions = 0;
    vmload(&guest.vmcb);
    svm_run((uint64_t)&guest.vmcb, guest.gpr);
    vmsave(&guest.vmcb);
    vmload(&host);
    guest.debug_exceptions = debug_exceptions;
    read_control_registers(&guest);
}

static void restore_control_registers(void)
{
    write_cr4(before.host_cr4);
    write_cr0(before.host_cr0);
    wrmsr(IA32_EFER, before.host_efer);
}

static void print_changed(uint64_t name, const uint64_t *old, const uint64_t *new, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (old[i] != new[i])
            print(" %lx %lx", name + i * WORD, new[i]);
}

/* The exit, then every word that is no longer what it was: of the block, and of watched memory. */
static void print_result(uint64_t number, const uint64_t *memory)
{
    const struct vmcb *vmcb = &guest.vmcb;

    print("%lu exit %lx %lx %lx %lx", number, vmcb->exit_code, vmcb->exit_info1, vmcb->exit_info2, vmcb->exit_int_info);
    before.vmcb.exit_code = vmcb->exit_code;
    before.vmcb.exit_info1 = vmcb->exit_info1;
    before.vmcb.exit_info2 = vmcb->exit_info2;
    before.vmcb.exit_int_info = vmcb->exit_int_info;
    print_changed(0, (const uint64_t *)&before, (const uint64_t *)&guest, sizeof guest / WORD);
    for (uint64_t count = *memory++; count; count--) {
        struct piece piece;

        memory = read_piece(memory, &piece);
        if (piece.watched)
            print_changed((uint64_t)piece.address, piece.contents, piece.address, piece.words);
    }
    print("\n");
}

static const uint64_t *run_state(uint64_t number, const uint64_t *memory, const uint64_t *base, const uint64_t *changes)
{
    memset(&guest, 0, sizeof guest);
    write_fields(base);
    changes = write_fields(changes);
    read_control_registers(&guest);
    memcpy(&before, &guest, sizeof guest);
    run_guest();
    restore_control_registers();
    print_result(number, memory);
    return changes;
}

int main(const struct multiboot_info *info)
{
    const uint64_t *list = state_list_open(info, MAGIC);

    exception_handler(VECTOR_DB, debug_handler);
    svm_enable(0);
    vmsave(&host);
    print_processor();
    state_list_run(list, place_memory, run_state);
    return STATUS_PASS;
}
