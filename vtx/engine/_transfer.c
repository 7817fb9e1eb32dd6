/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Registers between a saved context of the engine and the model, in C because every trap needs them both ways. The
 * compiled twin of `Registers` in context.py; a test holds the two together.
 *
 * Nothing here links against Unicorn: the addresses of the functions it calls are given to the constructor.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define GPRS 16
#define RFLAGS_FIXED 0x2
#define RFLAGS_DF 0x400
#define ARITHMETIC 0x8d5 /* CF, PF, AF, ZF, SF, OF */
#define CC_OP_EFLAGS 1
#define CODE64 0x8000
#define MASK32 0xffffffff

struct registers { /* as Unicorn keeps them in a context; see layout.py */
    uint64_t gpr[GPRS], rip, eflags, cc_dst, cc_src, cc_src2;
    uint32_t cc_op;
    int32_t direction;
    uint32_t hidden, hidden2;
    struct {
        uint64_t selector, base;
        uint32_t limit, flags;
    } segments[10];
};

typedef struct {
    PyObject_HEAD
    void *engine, *context;
    volatile struct registers *in_context;
    int (*save)(void *, void *);
    int (*restore)(void *, void *);
    int (*read_register)(void *, int, void *);
    int flags_register;
    uint64_t rflags; /* as last taken */
} Transfer;

static int transfer_init(Transfer *self, PyObject *arguments, PyObject *keywords)
{
    unsigned long long engine, context, state, save, restore, read_register;

    if (!PyArg_ParseTuple(arguments, "KKKKKKi", &engine, &context, &state, &save, &restore, &read_register,
                          &self->flags_register))
        return -1;
    self->engine = (void *)(uintptr_t)engine;
    self->context = (void *)(uintptr_t)context;
    self->in_context = (struct registers *)(uintptr_t)(context + state);
    self->save = (int (*)(void *, void *))(uintptr_t)save;
    self->restore = (int (*)(void *, void *))(uintptr_t)restore;
    self->read_register = (int (*)(void *, int, void *))(uintptr_t)read_register;
    return 0;
}

static uint64_t rflags_of(Transfer *self)
{
    volatile struct registers *from = self->in_context;
    uint64_t value = 0;

    if (from->cc_op == CC_OP_EFLAGS)
        return (from->eflags & ~(uint64_t)(ARITHMETIC | RFLAGS_DF)) | (from->cc_src & ARITHMETIC) |
               ((uint32_t)from->direction & RFLAGS_DF);
    self->read_register(self->engine, self->flags_register, &value);
    return value;
}

static int is_gpr_list(PyObject *list)
{
    if (PyList_CheckExact(list) && PyList_GET_SIZE(list) == GPRS)
        return 1;
    PyErr_SetString(PyExc_TypeError, "the general-purpose registers are a list of 16");
    return 0;
}

static PyObject *take(Transfer *self, PyObject *gprs)
{
    volatile struct registers *from = self->in_context;
    uint64_t linear = from->rip;
    int i;

    if (!is_gpr_list(gprs))
        return NULL;
    for (i = 0; i < GPRS; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(from->gpr[i]);
        if (!value || PyList_SetItem(gprs, i, value))
            return NULL;
    }
    self->rflags = rflags_of(self);
    if (!(from->hidden & CODE64))
        linear = (linear + from->segments[1].base) & MASK32;
    return Py_BuildValue("KKIK", (unsigned long long)from->rip, (unsigned long long)self->rflags, from->hidden,
                         (unsigned long long)linear);
}

static PyObject *give(Transfer *self, PyObject *const *arguments, Py_ssize_t count)
{
    volatile struct registers *to = self->in_context;
    uint64_t rflags;
    int i;

    if (count != 3 || !is_gpr_list(arguments[0]))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "give takes GPRs, RIP and RFLAGS");
    for (i = 0; i < GPRS; i++)
        to->gpr[i] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(arguments[0], i));
    to->rip = PyLong_AsUnsignedLongLong(arguments[1]);
    rflags = PyLong_AsUnsignedLongLong(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    if (rflags != self->rflags) {
        to->eflags = (rflags & ~(uint64_t)(ARITHMETIC | RFLAGS_DF)) | RFLAGS_FIXED;
        to->cc_src = rflags & ARITHMETIC;
        to->cc_dst = to->cc_src2 = 0;
        to->cc_op = CC_OP_EFLAGS;
        to->direction = rflags & RFLAGS_DF ? -1 : 1;
    }
    self->restore(self->engine, self->context);
    Py_RETURN_NONE;
}

static PyObject *save(Transfer *self, PyObject *unused)
{
    self->save(self->engine, self->context);
    Py_RETURN_NONE;
}

static PyObject *restore(Transfer *self, PyObject *unused)
{
    self->restore(self->engine, self->context);
    Py_RETURN_NONE;
}

static PyMethodDef transfer_methods[] = {
    {"save", (PyCFunction)save, METH_NOARGS, "Take the state out of the processor into the context."},
    {"restore", (PyCFunction)restore, METH_NOARGS, "Put the context into the processor."},
    {"take", (PyCFunction)take, METH_O,
     "Fill the list of GPRs from the context; RIP, RFLAGS, the hidden flags and the linear address of the code."},
    {"give", (PyCFunction)(void (*)(void))give, METH_FASTCALL,
     "Put GPRs, RIP and RFLAGS into the context, and it into the processor, in the middle of a run."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject transfer_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "vtx.engine._transfer.Transfer",
    .tp_doc = "Registers between one engine's context and the model.",
    .tp_basicsize = sizeof(Transfer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)transfer_init,
    .tp_methods = transfer_methods,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_transfer", "Compiled register transfer of the engine.", -1, NULL,
};

PyMODINIT_FUNC PyInit__transfer(void)
{
    PyObject *result;

    if (PyType_Ready(&transfer_type) < 0)
        return NULL;
    result = PyModule_Create(&module);
    if (result && PyModule_AddObjectRef(result, "Transfer", (PyObject *)&transfer_type) < 0) {
        Py_DECREF(result);
        return NULL;
    }
    return result;
}
