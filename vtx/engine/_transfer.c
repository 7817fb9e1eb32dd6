/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Registers between a saved context of the engine and the model, in C because every trap needs them both ways. The
 * compiled twin of `Transfer` in transfer.py; a test holds the two together.
 *
 * Nothing here links against Unicorn: the addresses of the functions it calls are given to the constructor.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define INTERFACE 3 /* changes with what transfer.py relies on */
#define GPRS 16
#define LEGACY_GPRS 8 /* those of other modes than 64-bit mode */
#define SEGMENTS 10 /* ES CS SS DS FS GS LDTR TR GDTR IDTR */
#define TABLES 2    /* the last of them */
#define UNUSABLE 0x10000
#define ACCESS_RIGHTS 0xf0ff
#define RFLAGS_FIXED 0x2
#define RFLAGS_DF 0x400
#define ARITHMETIC 0x8d5 /* CF, PF, AF, ZF, SF, OF */
#define CC_OP_EFLAGS 1
#define CODE64 0x8000
#define GLOBAL_INTERRUPT_FLAG 1
#define MASK32 0xffffffff

enum control { CR0, CR2, CR4, EFER, KERNEL_GS_BASE, CONTROLS };

struct registers { /* as Unicorn keeps them in a context; see layout.py */
    uint64_t gpr[GPRS], rip, eflags, cc_dst, cc_src, cc_src2;
    uint32_t cc_op;
    int32_t direction;
    uint32_t hidden, hidden2;
    struct segment {
        uint64_t selector, base;
        uint32_t limit, flags;
    } segments[SEGMENTS];
};

typedef struct {
    PyObject_HEAD
    void *engine, *context;
    struct registers *in_context;
    int (*save)(void *, void *);
    int (*restore)(void *, void *);
    int (*read_register)(void *, int, void *);
    int flags_register;
    Py_ssize_t control[CONTROLS]; /* where these registers are, from the general registers on */
    PyTypeObject *segment_type, *table_type;
    Py_ssize_t segment_slots[4], table_slots[2]; /* where their attributes are in an object */
    uint64_t rflags;         /* as last taken */
    struct segment segments[SEGMENTS]; /* as last put or taken */
} Transfer;

static const char *const segment_attributes[] = {"base", "limit", "selector", "access_rights"};

/* Where the objects of a class with __slots__ keep the attributes of these names. */
static int find_slots(PyTypeObject *type, int count, Py_ssize_t *offsets)
{
    int i;

    for (i = 0; i < count; i++) {
        PyObject *descriptor = PyObject_GetAttrString((PyObject *)type, segment_attributes[i]);

        if (!descriptor)
            return -1;
        if (!Py_IS_TYPE(descriptor, &PyMemberDescr_Type)) {
            Py_DECREF(descriptor);
            PyErr_Format(PyExc_TypeError, "%s.%s is no slot", type->tp_name, segment_attributes[i]);
            return -1;
        }
        offsets[i] = ((PyMemberDescrObject *)descriptor)->d_member->offset;
        Py_DECREF(descriptor);
    }
    return 0;
}

static int transfer_init(Transfer *self, PyObject *arguments, PyObject *keywords)
{
    unsigned long long engine, context, state, save, restore, read_register;

    if (!PyArg_ParseTuple(arguments, "KKKKKKi(nnnnn)O!O!", &engine, &context, &state, &save, &restore, &read_register,
                          &self->flags_register, &self->control[CR0], &self->control[CR2], &self->control[CR4],
                          &self->control[EFER], &self->control[KERNEL_GS_BASE], &PyType_Type, &self->segment_type,
                          &PyType_Type, &self->table_type) ||
        find_slots(self->segment_type, 4, self->segment_slots) || find_slots(self->table_type, 2, self->table_slots))
        return -1;
    Py_INCREF(self->segment_type);
    Py_INCREF(self->table_type);
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
    struct registers *from = self->in_context;
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
    struct registers *from = self->in_context;
    uint64_t linear = from->rip, kernel_gs_base;
    int i, changed;

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
    changed = memcmp(from->segments, self->segments, sizeof self->segments) != 0;
    if (changed)
        memcpy(self->segments, from->segments, sizeof self->segments);
    memcpy(&kernel_gs_base, (char *)from + self->control[KERNEL_GS_BASE], sizeof kernel_gs_base);
    return Py_BuildValue("KKIKKi", (unsigned long long)from->rip, (unsigned long long)self->rflags, from->hidden,
                         (unsigned long long)linear, (unsigned long long)kernel_gs_base, changed);
}

static uint64_t slot(PyObject *object, Py_ssize_t offset)
{
    PyObject *value = *(PyObject **)((char *)object + offset);

    if (value)
        return PyLong_AsUnsignedLongLong(value);
    PyErr_SetString(PyExc_AttributeError, "a segment or table register without a value");
    return 0;
}

static PyObject *put_system(Transfer *self, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t i;

    if (count != SEGMENTS + CONTROLS)
        return PyErr_Format(PyExc_TypeError, "put_system takes %d registers", SEGMENTS + CONTROLS);
    for (i = 0; i < SEGMENTS; i++) {
        struct segment *segment = &self->segments[i];
        PyObject *object = arguments[i];

        if (i < SEGMENTS - TABLES) {
            uint64_t rights;

            if (!Py_IS_TYPE(object, self->segment_type))
                return PyErr_Format(PyExc_TypeError, "register %zd is no segment", i);
            segment->base = slot(object, self->segment_slots[0]);
            segment->limit = slot(object, self->segment_slots[1]);
            segment->selector = slot(object, self->segment_slots[2]);
            rights = slot(object, self->segment_slots[3]);
            segment->flags = rights & UNUSABLE ? 0 : (rights & ACCESS_RIGHTS) << 8;
        } else {
            if (!Py_IS_TYPE(object, self->table_type))
                return PyErr_Format(PyExc_TypeError, "register %zd is no descriptor table", i);
            segment->base = slot(object, self->table_slots[0]);
            segment->limit = slot(object, self->table_slots[1]);
        }
    }
    for (i = 0; i < CONTROLS; i++) {
        uint64_t value = PyLong_AsUnsignedLongLong(arguments[SEGMENTS + i]);

        memcpy((char *)self->in_context + self->control[i], &value, sizeof value);
    }
    if (PyErr_Occurred())
        return NULL;
    memcpy(self->in_context->segments, self->segments, sizeof self->segments);
    Py_RETURN_NONE;
}

static int put_registers(struct registers *to, PyObject *gprs, PyObject *rip, PyObject *rflags, uint64_t *flags)
{
    int i;

    if (!is_gpr_list(gprs))
        return -1;
    for (i = 0; i < GPRS; i++)
        to->gpr[i] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(gprs, i));
    to->rip = PyLong_AsUnsignedLongLong(rip);
    *flags = PyLong_AsUnsignedLongLong(rflags);
    return PyErr_Occurred() ? -1 : 0;
}

static void put_lazy_flags(struct registers *to, uint64_t rflags)
{
    to->cc_src = rflags & ARITHMETIC;
    to->cc_dst = to->cc_src2 = 0;
    to->cc_op = CC_OP_EFLAGS;
    to->direction = rflags & RFLAGS_DF ? -1 : 1;
}

static PyObject *put(Transfer *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct registers *to = self->in_context;
    uint64_t rflags;
    int i;

    if (count != 4)
        return PyErr_Format(PyExc_TypeError, "put takes GPRs, RIP, RFLAGS and the hidden flags");
    if (put_registers(to, arguments[0], arguments[1], arguments[2], &rflags))
        return NULL;
    to->hidden = PyLong_AsUnsignedLong(arguments[3]);
    if (PyErr_Occurred())
        return NULL;
    if (!(to->hidden & CODE64)) { /* a near jump of the library would go to the whole of the register */
        for (i = 0; i < LEGACY_GPRS; i++)
            to->gpr[i] &= MASK32;
    }
    to->eflags = rflags | RFLAGS_FIXED; /* all of it: entering the engine derives the lazy flags from here */
    put_lazy_flags(to, rflags);
    to->hidden2 = GLOBAL_INTERRUPT_FLAG;
    self->restore(self->engine, self->context);
    Py_RETURN_NONE;
}

static PyObject *give(Transfer *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct registers *to = self->in_context;
    uint64_t rflags;

    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "give takes GPRs, RIP and RFLAGS");
    if (put_registers(to, arguments[0], arguments[1], arguments[2], &rflags))
        return NULL;
    if (rflags != self->rflags) {
        to->eflags = (rflags & ~(uint64_t)(ARITHMETIC | RFLAGS_DF)) | RFLAGS_FIXED;
        put_lazy_flags(to, rflags);
    }
    self->restore(self->engine, self->context);
    Py_RETURN_NONE;
}

/* The callback of the engine for interrupts, which makes the Python function given as its data do the work. */

static void on_interrupt(void *engine, uint32_t number, void *data)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *argument = PyLong_FromUnsignedLong(number), *result = NULL;

    if (argument)
        result = PyObject_CallOneArg(data, argument);
    if (!result)
        PyErr_WriteUnraisable(data);
    Py_XDECREF(result);
    Py_XDECREF(argument);
    PyGILState_Release(state);
}

static PyObject *callback(PyObject *self, PyObject *unused)
{
    return PyLong_FromVoidPtr((void *)(uintptr_t)on_interrupt);
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
     "Fill the list of GPRs from the context; RIP, RFLAGS, the hidden flags, the linear address of the code, the kernel "
     "GS base, and whether a segment or table register changed."},
    {"put_system", (PyCFunction)(void (*)(void))put_system, METH_FASTCALL,
     "Put the eight segment registers, the two table registers, CR0, CR2, CR4, EFER and the kernel GS base into the "
     "context."},
    {"put", (PyCFunction)(void (*)(void))put, METH_FASTCALL,
     "Put GPRs, RIP, RFLAGS and the hidden flags into the context, and it into the processor, before a run."},
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

static PyMethodDef methods[] = {
    {"callback", callback, METH_NOARGS, "Address of the callback for interrupts."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_transfer", "Compiled register transfer of the engine.", -1, methods,
};

PyMODINIT_FUNC PyInit__transfer(void)
{
    PyObject *result;

    if (PyType_Ready(&transfer_type) < 0)
        return NULL;
    result = PyModule_Create(&module);
    if (result && PyModule_AddIntConstant(result, "INTERFACE", INTERFACE))
        Py_CLEAR(result);
    if (result && PyModule_AddObjectRef(result, "Transfer", (PyObject *)&transfer_type) < 0) {
        Py_DECREF(result);
        return NULL;
    }
    return result;
}
