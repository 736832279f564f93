// SPDX-License-Identifier: GPL-2.0-only
/*
 * Every type of relocation that modules for x86-64 have, and each kind of thing they lead to:
 * constants, variables, zeroed variables, code of this payload, code and data of the kernel, and
 * weak symbols that nobody defines.
 */
#include <linux/jiffies.h>
#include <linux/string.h>

#include "../payload.h"

static const char locus_text[] = "relocated";
static int locus_numbers[4] = { 3, 5, 7, 11 };
static int locus_zeroed[4];

/* R_X86_64_64, with and without an addend, from data and from constants. */
static int *locus_third = &locus_numbers[2];
static int *locus_last_zero = &locus_zeroed[3];
static const char *locus_middle = locus_text + 2;
static const char *const locus_names[] = { "zero", "one", "two" };
static unsigned long volatile *locus_jiffies = &jiffies;

static noinline int locus_twice(int x)
{
	return 2 * x;
}

static noinline __cold int locus_thrice(int x)
{
	return 3 * x;
}

static int (*const locus_calls[])(int) = { locus_twice, locus_thrice };
static int (*locus_kernels)(const char *, const char *) = strcmp;

/* Defined nowhere: their addresses are zero. */
extern int locus_nowhere(int x) __weak;
extern char locus_nothing[] __weak;

/* R_X86_64_PC64: distances. */
asm(".pushsection .rodata, \"a\"\n"
    ".balign 8\n"
    "locus_to_kernel: .quad saved_command_line - .\n"
    "locus_to_data: .quad locus_numbers + 4 - .\n"
    /* R_X86_64_NONE: nothing is to be done here. */
    ".reloc ., R_X86_64_NONE, saved_command_line\n"
    "locus_untouched: .quad 0x123456789abcdef\n"
    ".popsection\n");
extern const s64 locus_to_kernel, locus_to_data, locus_untouched;

static noinline int locus_indexed(int i)
{
	return locus_numbers[i] + locus_zeroed[i];
}

static u64 locus_sign_extended(void)
{
	u64 value;

	asm("movq $locus_numbers + 8, %0" : "=r" (value));
	return value;
}

static u64 locus_zero_extended(void)
{
	u64 value;

	asm("movl $locus_nothing + 5, %k0" : "=r" (value));
	return value;
}

static u64 locus_relative(void)
{
	u64 value;

	asm("leaq locus_numbers + 12(%%rip), %0" : "=r" (value));
	return value;
}

static u64 locus_absolute(void)
{
	u64 value;

	asm("movabsq $locus_numbers + 4, %0" : "=r" (value));
	return value;
}

static int locus_reloc_show(struct seq_file *m, void *v)
{
	u64 numbers = (unsigned long)READ_ONCE(locus_third) - 8;
	int index = 3;

	OPTIMIZER_HIDE_VAR(index);
	tell(m, "data pointer", *READ_ONCE(locus_third), 7);
	tell(m, "bss pointer", *READ_ONCE(locus_last_zero), 0);
	tell(m, "string pointer", strcmp(READ_ONCE(locus_middle), "located"), 0);
	tell(m, "string table", strcmp(locus_names[index - 1], "two"), 0);
	tell(m, "kernel data pointer", READ_ONCE(locus_jiffies) == &jiffies, 1);
	tell(m, "jiffies", jiffies - *READ_ONCE(locus_jiffies) < HZ, 1);
	tell(m, "function table", locus_calls[index - 3](10) + locus_calls[index - 2](10), 50);
	tell(m, "direct calls", locus_twice(index) + locus_thrice(index), 15);
	tell(m, "kernel function pointer", READ_ONCE(locus_kernels)("a", "a"), 0);
	tell(m, "weak function", locus_nowhere ? locus_nowhere(index) : 77, 77);
	tell(m, "weak data", (unsigned long)locus_nothing, 0);
	tell(m, "R_X86_64_32S index", locus_indexed(index), 11);
	tell(m, "R_X86_64_32S", locus_sign_extended(), numbers + 8);
	tell(m, "R_X86_64_32", locus_zero_extended(), 5);
	tell(m, "R_X86_64_PC32", locus_relative(), numbers + 12);
	tell(m, "R_X86_64_64", locus_absolute(), numbers + 4);
	tell(m, "R_X86_64_PC64 kernel", (unsigned long)&locus_to_kernel + locus_to_kernel,
	     (unsigned long)&saved_command_line);
	tell(m, "R_X86_64_PC64 data", (unsigned long)&locus_to_data + locus_to_data, numbers + 4);
	tell(m, "R_X86_64_NONE", locus_untouched, 0x123456789abcdef);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_reloc_show));
MODULE_DESCRIPTION("Test: every type of relocation");
