/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The per-block callback of the engine, in C because it runs once per translated block. It is the compiled twin of
 * PythonBlockClock in clock.py; the two must count alike, and a test holds them together.
 *
 * Nothing here links against Unicorn: the addresses of the two functions it calls come in the shared structure.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define CACHE_SLOTS 4096
#define RFLAGS_IF 0x200

struct uc_tb {
    uint64_t pc;
    uint16_t icount;
    uint16_t size;
};

struct block_clock {
    uint64_t elapsed;           /* bytes of code in the blocks entered */
    uint64_t limit;             /* stop before a block that would make elapsed exceed this */
    uint64_t address;           /* linear address and size of the block entered last */
    uint64_t size;
    uint64_t instructions;      /* instructions in the blocks entered */
    uint64_t instruction_limit; /* likewise */
    uint64_t watch_if;          /* stop before a block entered with RFLAGS.IF set */
    uint64_t stopped;           /* why: 0 not, 1 a limit, 2 RFLAGS.IF */
    int (*stop)(void *);
    int (*control)(void *, int, ...);
    int (*read_register)(void *, int, void *);
    uint64_t request_block;     /* uc_ctl code that describes a translated block */
    uint64_t flags_register;    /* Unicorn's number of RFLAGS */
    uint64_t generation;        /* raised whenever code changed: cached instruction counts are void */
    struct {
        uint64_t address;
        uint64_t key;           /* size and generation */
        uint64_t instructions;
    } cache[CACHE_SLOTS];
};

static uint64_t count_instructions(struct block_clock *clock, void *engine, uint64_t address, uint64_t size)
{
    uint64_t slot = (address ^ (address >> 12)) % CACHE_SLOTS;
    uint64_t key = size << 48 | (clock->generation & 0xffffffffffff);

    if (clock->cache[slot].address != address || clock->cache[slot].key != key) {
        struct uc_tb block = {0, 0, 0};
        clock->control(engine, (int)clock->request_block, address, &block);
        clock->cache[slot].address = address;
        clock->cache[slot].key = key;
        clock->cache[slot].instructions = block.icount;
    }
    return clock->cache[slot].instructions;
}

static void on_block(void *engine, uint64_t address, uint32_t size, void *data)
{
    struct block_clock *clock = data;

    clock->address = address;
    clock->size = size;
    clock->elapsed += size;
    clock->instructions += count_instructions(clock, engine, address, size);
    if (clock->elapsed > clock->limit || clock->instructions > clock->instruction_limit) {
        clock->stopped = 1;
        clock->stop(engine);
    } else if (clock->watch_if) {
        uint64_t flags = 0;
        clock->read_register(engine, (int)clock->flags_register, &flags);
        if (flags & RFLAGS_IF) {
            clock->stopped = 2;
            clock->stop(engine);
        }
    }
}

static PyObject *callback_address(PyObject *self, PyObject *unused)
{
    return PyLong_FromVoidPtr((void *)on_block);
}

static PyObject *structure_size(PyObject *self, PyObject *unused)
{
    return PyLong_FromSize_t(sizeof(struct block_clock));
}

static PyMethodDef methods[] = {
    {"callback_address", callback_address, METH_NOARGS, "Address of the block callback."},
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
