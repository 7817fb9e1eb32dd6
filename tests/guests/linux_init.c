/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The first and only program of a Linux that boots in a test: says which kernel runs it, and ends the run with 0.
 * Without a C library: a static program of a page.
 */
#define SYS_WRITE 1
#define SYS_UNAME 63
#define SYS_IOPERM 173
#define DEBUG_EXIT_PORT 0xf4

static long call(long number, long first, long second, long third)
{
    long result;

    asm volatile("syscall"
                 : "=a"(result)
                 : "a"(number), "D"(first), "S"(second), "d"(third)
                 : "rcx", "r11", "memory");
    return result;
}

static void say(const char *text)
{
    long length = 0;

    while (text[length])
        length++;
    call(SYS_WRITE, 1, (long)text, length);
}

void start(void)
{
    static struct {
        char system[65], node[65], release[65], version[65], machine[65], domain[65];
    } names;

    call(SYS_UNAME, (long)&names, 0, 0);
    say("init: user space of ");
    say(names.system);
    say(" ");
    say(names.release);
    say("\n");
    if (call(SYS_IOPERM, DEBUG_EXIT_PORT, 4, 1))
        say("init: no access to the debug-exit port\n");
    asm volatile("outl %0, %1" : : "a"(0), "Nd"(DEBUG_EXIT_PORT));
    for (;;)
        ;
}

asm(".globl _start\n_start: xor %ebp, %ebp\n and $-16, %rsp\n call start\n");
