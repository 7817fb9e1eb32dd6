/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * From the Multiboot entry (32-bit protected mode, no paging) to main() in 64-bit mode.
 *
 * The loader guarantees: EAX = 0x2BADB002, EBX = address of the information structure, flat 32-bit
 * segments, interrupts off. Everything else (GDT, stack, paging) is ours to set up.
 */

        .set MULTIBOOT_MAGIC,   0x1BADB002
        .set MULTIBOOT_FLAGS,   0x3             # page-aligned modules, memory information

        .set CR0_WP,            1 << 16
        .set CR0_PG,            1 << 31
        .set CR4_PAE,           1 << 5
        .set IA32_EFER,         0xC0000080
        .set EFER_LME,          1 << 8
        .set PAGE_PRESENT_RW,   0x3
        .set PAGE_LARGE,        0x80

        .set CODE64,            0x08            # selectors; lib/descriptors.h says the same to C
        .set DATA,              0x10

        .section .multiboot, "a"
        .balign 4
        .long   MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

        .code32
        .section .text.start, "ax"
        .globl  _start
_start:
        cld
        lgdt    gdt_pointer
        mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $boot_stack_top, %esp
        mov     %ebx, %edi                      # first argument of main(); survives to 64-bit mode

        /* Identity-map the first GiB: one PML4 entry, one PDPT entry, 512 pages of 2 MiB. */
        movl    $(page_directory_pointers + PAGE_PRESENT_RW), pml4
        movl    $(page_directory + PAGE_PRESENT_RW), page_directory_pointers
        xor     %ecx, %ecx
        mov     $(PAGE_PRESENT_RW | PAGE_LARGE), %eax
1:      mov     %eax, page_directory(, %ecx, 8)
        add     $0x200000, %eax
        inc     %ecx
        cmp     $512, %ecx
        jne     1b

        /* The order the manual prescribes: PAE, CR3, EFER.LME, then CR0.PG activates IA-32e mode. */
        mov     %cr4, %eax
        or      $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $IA32_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     %cr0, %eax
        or      $(CR0_PG | CR0_WP), %eax
        mov     %eax, %cr0
        ljmp    $CODE64, $start64

        .code64
start64:
        xor     %eax, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        lldt    %ax
        mov     $boot_stack_top, %rsp
        mov     %edi, %edi                      # zero-extend: the upper half is undefined here
        call    main
        mov     %eax, %edi
        call    machine_exit                    # does not return

        .section .data
        .balign 16
        .globl  gdt, gdt_pointer
gdt:
        .quad   0
        .quad   0x00AF9B000000FFFF              # 0x08: 64-bit code, DPL 0, accessed
        .quad   0x00CF93000000FFFF              # 0x10: data, DPL 0, accessed, 4 GiB
        .quad   0, 0                            # 0x18: 64-bit TSS, filled in by descriptors_init()
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt

        .section .bss
        .balign 4096
        .globl  pml4
pml4:                           .skip 4096
page_directory_pointers:        .skip 4096
page_directory:                 .skip 4096
boot_stack:                     .skip 16384
boot_stack_top:

        .section .note.GNU-stack, "", @progbits
