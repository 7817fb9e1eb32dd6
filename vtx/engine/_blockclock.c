/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The per-block callback of the engine, in C because it runs once per translated block. It is the compiled twin of
 * BlockClock in clock.py; the two must count alike, and a test holds them together.
 *
 * Nothing here links against Unicorn: the addresses of the functions it calls come in the shared structure.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define BLOCK_SLOTS 4096
#define PAGE_SLOTS 1024
#define PAGE_SHIFT 12
#define PAGE_SIZE 4096
#define RFLAGS_IF 0x200

#define STOPPED_BY_LIMIT 1
#define STOPPED_BY_IF 2
#define STOPPED_BY_BLOCK 3
#define STOPPED_BY_GUARD 4
#define STOPPED_BY_LIMIT_OF_CS 5

#define FACTS_INSTRUCTIONS 0xffffffff
#define FACTS_STOP ((uint64_t)1 << 32)
#define FACTS_GUARDED ((uint64_t)1 << 33)
#define FACTS_GUARDS_SHIFT 40

/* Kinds of code, see code_kind.py. */
#define KIND_SHORT_CODE 1
#define KIND_LIKE_8086 4
#define KIND_64 64
#define KIND_BITS 19

#define CS 1
#define FS 4
#define GPR_COUNT 16

/* Access rights, as in the second doubleword of a descriptor. */
#define WRITABLE_OR_READABLE (1 << 9)
#define EXPAND_DOWN (1 << 10)
#define CODE (1 << 11)
#define PRESENT (1 << 15)
#define BIG (1 << 22)

#define BOUNDARY ((uint64_t)1 << 63) /* of a size: examine is asked whether an instruction begins behind it */

#define GUARD_WRITES 1
#define GUARD_LIMITED 2
#define GUARD_ALWAYS 4
#define GUARD_LAST 8

/* A memory operand that must be checked before its block runs, see guards.py. */
struct guard {
    uint64_t instruction;       /* its linear address */
    uint64_t displacement;
    uint64_t mask;              /* of the address size */
    uint32_t size;
    uint32_t alignment;         /* bits of the linear address that must be 0 */
    int8_t segment;
    int8_t base;                /* numbers of GPRs, or negative */
    int8_t index;
    int8_t shift;
    uint32_t flags;
};

struct segment {
    uint32_t selector;
    uint32_t padding;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
};

struct block_clock {
    uint64_t elapsed;           /* bytes of code in the blocks entered */
    uint64_t limit;             /* stop before a block that would make elapsed exceed this */
    uint64_t address;           /* linear address and size of the block entered last */
    uint64_t size;
    uint64_t instructions;      /* instructions in the blocks entered */
    uint64_t instruction_limit; /* likewise */
    uint64_t single;            /* stop before a second block: the code is stepped, blocks hold one instruction */
    uint64_t native;            /* do not stop before a block because of what is in it */
    uint64_t watch_if;          /* stop before a block entered with RFLAGS.IF set */
    uint64_t stopped;           /* why: STOPPED_BY_ something, or 0 */
    uint64_t kind;              /* kind of the code being run */
    void (*stop)(void *);
    void (*read_register)(void *, int, void *);
    uint64_t flags_register;    /* Unicorn's number of RFLAGS */
    uint64_t (*examine)(uint64_t, uint64_t); /* facts about the code at an address, of a size */
    const struct guard *guards; /* of all blocks; facts say where those of a block begin */
    const struct segment *segments; /* of the running code, ES to GS */
    uint64_t failed;            /* linear address of the instruction whose guard failed */
    uint64_t left_address;      /* the block before the one that is beyond the limit of CS */
    uint64_t left_size;
    uint64_t rip_register;      /* Unicorn's number of RIP */
    uint64_t registers[GPR_COUNT + 2]; /* Unicorn's numbers of the GPRs and of the bases of FS and GS */
    uint64_t generation;        /* raised whenever code changed: all facts known are void */
    uint64_t recent;            /* address of the block whose facts are in recent_facts; all ones: none */
    uint64_t recent_facts;
    struct {
        uint64_t page;          /* linear page number */
        uint64_t code;          /* the frame its code is in, above the bits of a kind of code */
        const uint8_t *bytes;   /* the page itself if stores to it go unnoticed, else null */
    } pages[PAGE_SLOTS];
    struct {
        uint64_t address;
        uint64_t key;           /* size and generation */
        uint64_t code;
        uint64_t facts;
    } blocks[BLOCK_SLOTS];
};

static uint64_t checksum(const uint8_t *page, uint64_t offset, uint64_t size)
{
    uint64_t end = offset + size < PAGE_SIZE ? offset + size : PAGE_SIZE, sum = 0xcbf29ce484222325;

    for (; offset < end; offset++)
        sum = (sum ^ page[offset]) * 0x100000001b3;
    return sum;
}

static uint64_t facts_of(struct block_clock *clock, uint64_t address, uint64_t size)
{
    uint64_t page = address >> PAGE_SHIFT;
    uint64_t page_slot = page % PAGE_SLOTS;
    uint64_t slot = (address ^ address >> PAGE_SHIFT ^ size << 5) % BLOCK_SLOTS;
    uint64_t key = size << 48 | (clock->generation & 0xffffffffffff);
    uint64_t code = clock->pages[page_slot].code ^ clock->kind;

    if (clock->pages[page_slot].page != page)
        return clock->examine(address, size);
    if (clock->pages[page_slot].bytes)
        code ^= checksum(clock->pages[page_slot].bytes, address % PAGE_SIZE, size) << KIND_BITS;
    if (clock->blocks[slot].address != address || clock->blocks[slot].key != key || clock->blocks[slot].code != code) {
        clock->blocks[slot].facts = clock->examine(address, size);
        clock->blocks[slot].address = address;
        clock->blocks[slot].key = key;
        clock->blocks[slot].code = code;
    }
    return clock->blocks[slot].facts;
}

static uint64_t register_of(struct block_clock *clock, void *engine, int number)
{
    uint64_t value = 0;

    clock->read_register(engine, (int)clock->registers[number], &value);
    return value;
}

static int forbids(const struct segment *segment, uint64_t kind, const struct guard *guard, uint64_t offset)
{
    uint64_t first = 0, last = segment->limit;
    uint32_t flags = segment->flags;

    if (!(kind & KIND_LIKE_8086)) {
        int code = !!(flags & CODE), allowed = !!(flags & WRITABLE_OR_READABLE);

        if (!(flags & PRESENT) || (guard->flags & GUARD_WRITES ? code || !allowed : code && !allowed))
            return 1;
        if (!code && flags & EXPAND_DOWN) {
            first = last + 1;
            last = flags & BIG ? 0xffffffff : 0xffff;
        }
    }
    return offset < first || offset + guard->size - 1 > last;
}

static int fails(struct block_clock *clock, void *engine, const struct guard *guard)
{
    uint64_t offset = guard->displacement;

    if (guard->flags & GUARD_ALWAYS)
        return 1;
    if (guard->base >= 0)
        offset += register_of(clock, engine, guard->base);
    if (guard->index >= 0)
        offset += register_of(clock, engine, guard->index) << guard->shift;
    offset &= guard->mask;
    if (guard->flags & GUARD_LIMITED && forbids(&clock->segments[guard->segment], clock->kind, guard, offset))
        return 1;
    if (!guard->alignment)
        return 0;
    if (!(clock->kind & KIND_64))
        offset += clock->segments[guard->segment].base;
    else if (guard->segment >= FS)
        offset += register_of(clock, engine, GPR_COUNT + guard->segment - FS);
    return !!(offset & guard->alignment);
}

/* Whether one of the guards of a block fails. */
static int guards_fail(struct block_clock *clock, void *engine, uint64_t facts)
{
    const struct guard *guard = clock->guards + (facts >> FACTS_GUARDS_SHIFT);

    for (;; guard++) {
        if (fails(clock, engine, guard)) {
            clock->failed = guard->instruction;
            return 1;
        }
        if (guard->flags & GUARD_LAST)
            return 0;
    }
}

static void stop_before(struct block_clock *clock, void *engine, uint64_t reason)
{
    clock->stopped = reason;
    clock->stop(engine);
}

/* Whether a block about to run leaves the code segment before it reaches the limits of the run. */
static int is_beyond(struct block_clock *clock, void *engine, uint64_t size)
{
    uint64_t rip = 0;

    if (clock->native || clock->instructions >= clock->instruction_limit || clock->elapsed + size > clock->limit)
        return 0;
    clock->read_register(engine, (int)clock->rip_register, &rip);
    return (uint32_t)rip + size - 1 > clock->segments[CS].limit;
}

/* Outside 64-bit mode Unicorn adds CS base and EIP without wrapping. */
static uint64_t linear(const struct block_clock *clock, uint64_t address)
{
    return clock->kind & KIND_64 ? address : (uint32_t)address;
}

static void on_block(void *engine, uint64_t library_address, uint32_t size, void *data)
{
    struct block_clock *clock = data;
    uint64_t address = linear(clock, library_address), offset = address - clock->address, facts;
    int inside = offset < clock->size;
    int second = clock->single && clock->size && !inside;

    if (inside && (offset + size != clock->size || clock->single) &&
        clock->examine(clock->address, offset | BOUNDARY)) {
        /* A store changed the block it is in: the block was left at the store, which starts over. Code that jumps
           into the middle of one of its instructions is another block. */
        clock->elapsed -= clock->size - offset;
        clock->instructions -= clock->examine(address, clock->size - offset) & FACTS_INSTRUCTIONS;
        clock->recent = ~(uint64_t)0;
    }
    if (clock->kind & KIND_SHORT_CODE && !second && is_beyond(clock, engine, size)) {
        clock->left_address = clock->address;
        clock->left_size = clock->size;
        clock->address = address;
        clock->size = 0;
        clock->recent = ~(uint64_t)0;
        stop_before(clock, engine, STOPPED_BY_LIMIT_OF_CS);
        return;
    }
    if (address == clock->recent && size == clock->size) {
        facts = clock->recent_facts;
    } else {
        facts = facts_of(clock, address, size);
        clock->recent = clock->pages[(address >> PAGE_SHIFT) % PAGE_SLOTS].bytes ? ~(uint64_t)0 : address;
        clock->recent_facts = facts;
        clock->address = address;
        clock->size = size;
    }
    clock->elapsed += size;
    clock->instructions += facts & FACTS_INSTRUCTIONS;
    if (second || clock->elapsed > clock->limit || clock->instructions > clock->instruction_limit) {
        stop_before(clock, engine, STOPPED_BY_LIMIT);
    } else if (facts & FACTS_STOP && !clock->native) {
        stop_before(clock, engine, STOPPED_BY_BLOCK);
    } else if (facts & FACTS_GUARDED && !clock->native && guards_fail(clock, engine, facts)) {
        stop_before(clock, engine, STOPPED_BY_GUARD);
    } else if (clock->watch_if) {
        uint64_t flags = 0;
        clock->read_register(engine, (int)clock->flags_register, &flags);
        if (flags & RFLAGS_IF)
            stop_before(clock, engine, STOPPED_BY_IF);
    }
}

/* The callback of single instructions whose operands cannot be guarded at the entry of their block. */
static void on_instruction(void *engine, uint64_t address, uint32_t size, void *data)
{
    struct block_clock *clock = data;
    uint64_t facts;

    if (clock->native || clock->stopped)
        return;
    facts = facts_of(clock, linear(clock, address), size);
    if (facts & FACTS_GUARDED && guards_fail(clock, engine, facts))
        stop_before(clock, engine, STOPPED_BY_GUARD);
}

static PyObject *callback_address(PyObject *self, PyObject *unused)
{
    return PyLong_FromVoidPtr((void *)on_block);
}

static PyObject *instruction_callback_address(PyObject *self, PyObject *unused)
{
    return PyLong_FromVoidPtr((void *)on_instruction);
}

static PyObject *structure_size(PyObject *self, PyObject *unused)
{
    return PyLong_FromSize_t(sizeof(struct block_clock));
}

static PyMethodDef methods[] = {
    {"callback_address", callback_address, METH_NOARGS, "Address of the block callback."},
    {"instruction_callback_address", instruction_callback_address, METH_NOARGS,
     "Address of the callback of single instructions."},
    {"structure_size", structure_size, METH_NOARGS, "Size of struct block_clock in bytes."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_blockclock", "Compiled block callback of the engine.", -1, methods,
};

PyMODINIT_FUNC PyInit__blockclock(void)
{
    return PyModule_Create(&module);
}
