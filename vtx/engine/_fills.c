/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The callback for misses of the engine's TLB, and the fills it can give again without asking the model. The compiled
 * twin of `Fills` in fills.py, which always asks.
 *
 * At every VM entry and VM exit the engine forgets its translations, and the next accesses ask for the same ones again.
 * What was answered is remembered with all that the answer rests on: the context of translation, the privilege, the
 * translation in the model's TLB or the paging-structure entries it was made of, and which side the frame is on (see
 * coherence.py). If all that is still so, asking would give the same answer, and what asking does besides is done here.
 *
 * Nothing here links against Unicorn: the address of the function it calls is given to the constructor.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define INTERFACE 1 /* changes with what fills.py relies on */
#define SLOT_BITS 10
#define SLOTS (1 << SLOT_BITS) /* more than the pages that one exit of a hypervisor touches */
#define MOST_ENTRIES 24 /* four levels, each translated by four, and the page: 4 * 5 + 4; of more, none is kept */
#define PAGE_SHIFT 12
#define MEM_FETCH 18 /* uc_mem_type of the fill */
#define GRANTS_WRITE 2 /* in a grant */
#define CPL 3          /* in the hidden flags */
#define CODE64 0x8000
#define AC 0x40000 /* in RFLAGS */

struct slot {
    uint64_t page, context;
    uint32_t asked;
    int count;           /* of entries; -1 if they are not known */
    uint64_t grant;      /* 0: it was asked for, that is all */
    PyObject *number;    /* of the page */
    PyObject *frame;     /* its number */
    PyObject *translation;
    PyObject *large;     /* what to note about a large page, or NULL */
    struct {
        uint64_t *where, value;
    } entries[MOST_ENTRIES];
};

typedef struct {
    PyObject_HEAD
    void *engine, *saved;
    int (*save)(void *, void *);
    const uint64_t *eflags, *in_block, *stopped;
    const uint32_t *hidden;
    char *ram;
    PyObject *ask, *memory;
    PyObject *executed, *dirty, *shared, *member_executed, *member_writable, *all_writable, *noted; /* fills.py */
    PyObject *local, *global, *implicit, *large;                                                   /* the model's */
    uint64_t context; /* 0: nothing is remembered */
    unsigned long long count, most; /* fills since the TLB was empty, and how many may be given */
    unsigned long long given;       /* without asking, ever */
    char active, wanted;
    struct slot *pending; /* what is being asked for */
    struct slot *slots;
} Fills;

static void forget_slot(struct slot *slot)
{
    slot->grant = 0;
    Py_CLEAR(slot->number);
    Py_CLEAR(slot->frame);
    Py_CLEAR(slot->translation);
    Py_CLEAR(slot->large);
}

static bool holds_own(Fills *self, struct slot *slot)
{
    PyObject *own = PyObject_GetAttrString(self->memory, "own_page");
    int same = own ? PyObject_RichCompareBool(own, slot->frame, Py_EQ) : -1;

    Py_XDECREF(own);
    return same != 0;
}

/* Whether a walk, or the model's TLB, would still give the translation. */
static bool is_translated(Fills *self, struct slot *slot)
{
    PyObject *cached = PyDict_GetItemWithError(self->local, slot->number);
    int i;

    if (!cached)
        cached = PyDict_GetItemWithError(self->global, slot->number);
    if (cached)
        return cached == slot->translation;
    for (i = 0; i < slot->count; i++)
        if (*slot->entries[i].where != slot->entries[i].value)
            return false;
    return slot->count >= 0;
}

static bool is_noted(Fills *self, struct slot *slot)
{
    PyObject *noted = PyDict_GetItemWithError(self->noted, slot->number);

    return noted && PyTuple_CheckExact(noted) && PyTuple_GET_ITEM(noted, 1) == Py_False &&
           PyObject_RichCompareBool(PyTuple_GET_ITEM(noted, 0), slot->frame, Py_EQ) == 1;
}

/* Whether the frame is on the side of code, as the grant left it. */
static bool is_code(Fills *self, struct slot *slot)
{
    Py_ssize_t i;

    if (PySet_Contains(self->executed, slot->frame) != 1 || PySet_Contains(self->member_executed, slot->frame) != 1 ||
        PyDict_Contains(self->shared, slot->frame) != 0 || !is_noted(self, slot))
        return false;
    for (i = 0; i < PyList_GET_SIZE(self->all_writable); i++)
        if (PySet_Contains(PyList_GET_ITEM(self->all_writable, i), slot->frame) != 0)
            return false;
    return true;
}

static bool is_data(Fills *self, struct slot *slot)
{
    if (PySet_Contains(self->executed, slot->frame) != 0)
        return false;
    return !(slot->grant & GRANTS_WRITE) || (PySet_Add(self->member_writable, slot->frame) == 0 &&
                                             PySet_Add(self->dirty, slot->frame) == 0);
}

static uint64_t give_again(Fills *self, uint64_t address, int access)
{
    uint32_t asked = access | (*self->hidden & (CPL | CODE64)) << 8 | (*self->eflags & AC ? 1u << 31 : 0);
    uint64_t page = address >> PAGE_SHIFT;
    uint64_t hash = (page ^ self->context * 0x9e3779b1u ^ asked * 0x85ebca6bu) * 0x9e3779b97f4a7c15u;
    struct slot *slot = &self->slots[hash >> (64 - SLOT_BITS)];

    self->pending = slot;
    if (slot->page != page || slot->context != self->context || slot->asked != asked) {
        forget_slot(slot);
        slot->page = page;
        slot->context = self->context;
        slot->asked = asked;
        return 0;
    }
    self->wanted = 1;
    if (!slot->grant || PySet_GET_SIZE(self->implicit) || !is_translated(self, slot) || holds_own(self, slot) ||
        !(access == MEM_FETCH ? is_code(self, slot) : is_data(self, slot)))
        return 0;
    if (slot->large && PySet_Add(self->large, slot->large))
        return 0;
    self->wanted = 0;
    self->given++;
    return slot->grant;
}

struct tlb_entry { /* uc_tlb_entry */
    uint64_t address;
    uint32_t permissions;
};

static bool on_fill(void *engine, uint64_t address, int access, struct tlb_entry *entry, void *data)
{
    PyGILState_STATE state = PyGILState_Ensure();
    Fills *self = data;
    unsigned long long grant = 0;

    self->count++;
    self->wanted = 0;
    if (self->active && !*self->stopped && self->context && self->count <= self->most) {
        if (*self->in_block) /* before the first block of a run, the context is what the run began with */
            self->save(self->engine, self->saved);
        grant = give_again(self, address, access);
    }
    if (!grant && !PyErr_Occurred()) {
        PyObject *result = PyObject_CallFunction(self->ask, "Ki", (unsigned long long)address, access);

        if (result)
            grant = PyLong_AsUnsignedLongLong(result);
        Py_XDECREF(result);
    }
    if (PyErr_Occurred()) {
        PyErr_WriteUnraisable((PyObject *)self);
        grant = 0;
    }
    self->wanted = 0;
    PyGILState_Release(state);
    entry->address = grant & ~(uint64_t)0xfff;
    entry->permissions = grant & 7;
    return grant != 0;
}

static void set(PyObject **to, PyObject *value)
{
    PyObject *old = *to;

    Py_INCREF(value);
    *to = value;
    Py_XDECREF(old);
}

static int fills_init(Fills *self, PyObject *arguments, PyObject *keywords)
{
    unsigned long long engine, saved, save, eflags, hidden, in_block, stopped, ram;
    PyObject *ask, *memory, *executed, *dirty, *shared, *member_executed, *member_writable, *all_writable, *noted;

    if (!PyArg_ParseTuple(arguments, "OO(KKKKKKKK)(O!O!O!O!O!O!)O!", &ask, &memory, &engine, &saved, &save, &eflags,
                          &hidden, &in_block, &stopped, &ram, &PySet_Type, &executed, &PySet_Type, &dirty,
                          &PyDict_Type, &shared, &PySet_Type, &member_executed, &PySet_Type, &member_writable,
                          &PyList_Type, &all_writable, &PyDict_Type, &noted))
        return -1;
    if (!self->slots && !(self->slots = PyMem_Calloc(SLOTS, sizeof *self->slots))) {
        PyErr_NoMemory();
        return -1;
    }
    self->engine = (void *)(uintptr_t)engine;
    self->saved = (void *)(uintptr_t)saved;
    self->save = (int (*)(void *, void *))(uintptr_t)save;
    self->eflags = (const uint64_t *)(uintptr_t)eflags;
    self->hidden = (const uint32_t *)(uintptr_t)hidden;
    self->in_block = (const uint64_t *)(uintptr_t)in_block;
    self->stopped = (const uint64_t *)(uintptr_t)stopped;
    self->ram = (char *)(uintptr_t)ram;
    set(&self->ask, ask);
    set(&self->memory, memory);
    set(&self->executed, executed);
    set(&self->dirty, dirty);
    set(&self->shared, shared);
    set(&self->member_executed, member_executed);
    set(&self->member_writable, member_writable);
    set(&self->all_writable, all_writable);
    set(&self->noted, noted);
    return 0;
}

static PyObject *emptied(Fills *self, PyObject *translations)
{
    PyObject *local, *global, *implicit, *large;
    unsigned long long context;

    self->count = 0;
    self->context = 0;
    if (translations == Py_None)
        Py_RETURN_NONE;
    if (!PyArg_ParseTuple(translations, "KO!O!O!O!", &context, &PyDict_Type, &local, &PyDict_Type, &global,
                          &PySet_Type, &implicit, &PySet_Type, &large))
        return NULL;
    self->context = context;
    set(&self->local, local);
    set(&self->global, global);
    set(&self->implicit, implicit);
    set(&self->large, large);
    Py_RETURN_NONE;
}

static PyObject *remember(Fills *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct slot *slot = self->pending;
    PyObject *entries;
    Py_ssize_t i;

    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "a grant, a frame, a translation, a note of a large page, and entries");
    if (!self->wanted || !slot)
        Py_RETURN_NONE;
    forget_slot(slot);
    entries = arguments[4];
    slot->count = -1;
    if (entries != Py_None && PyTuple_CheckExact(entries) && PyTuple_GET_SIZE(entries) <= MOST_ENTRIES) {
        slot->count = (int)PyTuple_GET_SIZE(entries);
        for (i = 0; i < slot->count; i++) {
            unsigned long long offset, value;

            if (!PyArg_ParseTuple(PyTuple_GET_ITEM(entries, i), "KK", &offset, &value))
                return NULL;
            slot->entries[i].where = (uint64_t *)(self->ram + offset);
            slot->entries[i].value = value;
        }
    }
    slot->grant = PyLong_AsUnsignedLongLong(arguments[0]);
    if (PyErr_Occurred()) {
        slot->grant = 0;
        return NULL;
    }
    slot->number = PyLong_FromUnsignedLongLong(slot->page);
    if (!slot->number) {
        slot->grant = 0;
        return NULL;
    }
    Py_INCREF(arguments[1]);
    slot->frame = arguments[1];
    Py_INCREF(arguments[2]);
    slot->translation = arguments[2];
    if (arguments[3] != Py_None) {
        Py_INCREF(arguments[3]);
        slot->large = arguments[3];
    }
    Py_RETURN_NONE;
}

static int fills_clear(Fills *self)
{
    size_t i;

    self->context = 0;
    self->pending = NULL;
    for (i = 0; self->slots && i < SLOTS; i++)
        forget_slot(&self->slots[i]);
    Py_CLEAR(self->ask);
    Py_CLEAR(self->memory);
    Py_CLEAR(self->executed);
    Py_CLEAR(self->dirty);
    Py_CLEAR(self->shared);
    Py_CLEAR(self->member_executed);
    Py_CLEAR(self->member_writable);
    Py_CLEAR(self->all_writable);
    Py_CLEAR(self->noted);
    Py_CLEAR(self->local);
    Py_CLEAR(self->global);
    Py_CLEAR(self->implicit);
    Py_CLEAR(self->large);
    return 0;
}

static int fills_traverse(Fills *self, visitproc visit, void *arg)
{
    size_t i;

    for (i = 0; self->slots && i < SLOTS; i++) {
        Py_VISIT(self->slots[i].translation);
        Py_VISIT(self->slots[i].large);
    }
    Py_VISIT(self->ask);
    Py_VISIT(self->memory);
    Py_VISIT(self->executed);
    Py_VISIT(self->dirty);
    Py_VISIT(self->shared);
    Py_VISIT(self->member_executed);
    Py_VISIT(self->member_writable);
    Py_VISIT(self->all_writable);
    Py_VISIT(self->noted);
    Py_VISIT(self->local);
    Py_VISIT(self->global);
    Py_VISIT(self->implicit);
    Py_VISIT(self->large);
    return 0;
}

static void fills_dealloc(Fills *self)
{
    PyObject_GC_UnTrack(self);
    fills_clear(self);
    PyMem_Free(self->slots);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef fills_methods[] = {
    {"emptied", (PyCFunction)emptied, METH_O,
     "The engine's TLB is empty, and what translates from now on is given: a number of the context, translations by "
     "page, local and global ones, pages granted for one access, and where large pages are noted; or None."},
    {"remember", (PyCFunction)(void (*)(void))remember, METH_FASTCALL,
     "The fill being asked for is answered by a grant of a frame, because of a translation; what to note about a large "
     "page, and the entries the translation is made of, or None."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef fills_members[] = {
    {"count", T_ULONGLONG, offsetof(Fills, count), READONLY, "Fills since the engine's TLB was empty."},
    {"most", T_ULONGLONG, offsetof(Fills, most), 0, "How many fills may be given without asking before it is emptied."},
    {"given", T_ULONGLONG, offsetof(Fills, given), READONLY, "Fills given without asking, ever."},
    {"active", T_BOOL, offsetof(Fills, active), 0, "Whether the engine runs, and a fill has to be answered."},
    {"wanted", T_BOOL, offsetof(Fills, wanted), READONLY, "Whether the fill being asked for is worth remembering."},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject fills_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "vtx.engine._fills.Fills",
    .tp_doc = "The fills of one engine.",
    .tp_basicsize = sizeof(Fills),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)fills_init,
    .tp_dealloc = (destructor)fills_dealloc,
    .tp_traverse = (traverseproc)fills_traverse,
    .tp_clear = (inquiry)fills_clear,
    .tp_methods = fills_methods,
    .tp_members = fills_members,
};

static PyObject *callback(PyObject *self, PyObject *unused)
{
    return PyLong_FromVoidPtr((void *)(uintptr_t)on_fill);
}

static PyMethodDef methods[] = {
    {"callback", callback, METH_NOARGS, "Address of the callback for fills, whose data is a `Fills`."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_fills", "Compiled memory of the engine's fills.", -1, methods,
};

PyMODINIT_FUNC PyInit__fills(void)
{
    PyObject *created;

    if (PyType_Ready(&fills_type) < 0)
        return NULL;
    created = PyModule_Create(&module);
    if (created && (PyModule_AddIntConstant(created, "INTERFACE", INTERFACE) < 0 ||
                    PyModule_AddObjectRef(created, "Fills", (PyObject *)&fills_type) < 0)) {
        Py_DECREF(created);
        return NULL;
    }
    return created;
}
