/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "console.h"

#include <stdarg.h>
#include <stdbool.h>

#include "cpu.h"

/* 16550 registers as offsets from the base port, and their bits. */
enum { UART_THR = 0, UART_DIVISOR_LOW = 0, UART_IER = 1, UART_DIVISOR_HIGH = 1, UART_LCR = 3, UART_LSR = 5 };
enum { LCR_8N1 = 0x03, LCR_DIVISOR_LATCH = 0x80, LSR_THR_EMPTY = 0x20, LSR_TRANSMITTER_EMPTY = 0x40 };

enum { DIGITS_MAX = 20 };

struct conversion {
    char kind;
    bool is_long, left, zero;
    int width;
};

static void wait_for(uint8_t line_status)
{
    while (!(inb(PORT_COM1 + UART_LSR) & line_status))
        ;
}

static void put_char(char c)
{
    if (c == '\n')
        put_char('\r');
    wait_for(LSR_THR_EMPTY);
    outb(PORT_COM1 + UART_THR, (uint8_t)c);
}

void console_init(void)
{
    wait_for(LSR_TRANSMITTER_EMPTY);            /* the level below may have printed just now */
    outb(PORT_COM1 + UART_IER, 0);              /* polled: no interrupts */
    outb(PORT_COM1 + UART_LCR, LCR_DIVISOR_LATCH | LCR_8N1);
    outb(PORT_COM1 + UART_DIVISOR_LOW, 1);      /* 115200 baud */
    outb(PORT_COM1 + UART_DIVISOR_HIGH, 0);
    outb(PORT_COM1 + UART_LCR, LCR_8N1);
}

static void put_padded(const char *text, int length, struct conversion c)
{
    int padding = c.width - length;

    if (!c.left)
        for (; padding > 0; padding--)
            put_char(c.zero ? '0' : ' ');
    for (int i = 0; i < length; i++)
        put_char(text[i]);
    for (; padding > 0; padding--)
        put_char(' ');
}

static void put_string(const char *text, struct conversion c)
{
    int length = 0;

    while (text[length])
        length++;
    put_padded(text, length, c);
}

static void put_number(uint64_t value, struct conversion c)
{
    unsigned base = c.kind == 'x' ? 16 : 10;
    char digits[DIGITS_MAX];
    int start = DIGITS_MAX;

    do {
        digits[--start] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    put_padded(digits + start, DIGITS_MAX - start, c);
}

/* Reads what follows a '%'; returns the first character after the conversion. */
static const char *parse_conversion(const char *format, struct conversion *c)
{
    *c = (struct conversion){0};
    for (; *format == '-' || *format == '0'; format++) {
        c->left |= *format == '-';
        c->zero |= *format == '0';
    }
    for (; *format >= '0' && *format <= '9'; format++)
        c->width = c->width * 10 + (*format - '0');
    if (*format == 'l') {
        c->is_long = true;
        format++;
    }
    c->kind = *format;
    return format + 1;
}

static void print_arguments(const char *format, va_list arguments)
{
    struct conversion c;

    while (*format) {
        if (*format != '%') {
            put_char(*format++);
            continue;
        }
        format = parse_conversion(format + 1, &c);
        if (c.kind == 's')
            put_string(va_arg(arguments, const char *), c);
        else if (c.kind == 'c')
            put_char((char)va_arg(arguments, int));
        else if (c.is_long)
            put_number(va_arg(arguments, uint64_t), c);
        else
            put_number(va_arg(arguments, uint32_t), c);
    }
}

void print(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    print_arguments(format, arguments);
    va_end(arguments);
}

void say(const char *format, ...)
{
    va_list arguments;

    print("%s", console_tag);
    va_start(arguments, format);
    print_arguments(format, arguments);
    va_end(arguments);
}

void fail(const char *format, ...)
{
    va_list arguments;

    print("%sFAIL: ", console_tag);
    va_start(arguments, format);
    print_arguments(format, arguments);
    va_end(arguments);
    machine_exit(STATUS_FAIL);
}

void machine_exit(uint32_t status)
{
    wait_for(LSR_TRANSMITTER_EMPTY);
    outl(PORT_DEBUG_EXIT, status);
    for (;;)
        hlt();
}
