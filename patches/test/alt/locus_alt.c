// SPDX-License-Identifier: GPL-2.0-only
/*
 * Alternatives: replacements that the CPU calls for and ones it doesn't, longer and shorter than
 * what they replace, with calls and jumps in them, several for one place.
 */
#include <linux/bitops.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <asm/alternative.h>
#include <asm/barrier.h>
#include <asm/cpufeature.h>
#include <asm/page.h>

#include "../payload.h"

/* Set on all CPUs, and on none since 2007. */
#define ALWAYS X86_FEATURE_ALWAYS
#define NEVER X86_FEATURE_CENTAUR_MCR

static u64 has(unsigned int feature)
{
	return !!(boot_cpu_data.x86_capability[feature / 32] & BIT(feature % 32));
}

/* 1, or 2 with the feature: the same length, a longer and a shorter replacement. */
#define SAME(feature) ({						\
	u64 value;							\
	asm volatile(ALTERNATIVE("movl $1, %k0", "movl $2, %k0", feature) : "=r" (value)); \
	value; })
#define LONGER(feature) ({						\
	u64 value;							\
	asm volatile(ALTERNATIVE("movl $1, %k0",			\
		"xorl %k0, %k0; addl $0x1000, %k0; subl $0xffe, %k0", feature) : "=r" (value)); \
	value; })
#define SHORTER(feature) ({						\
	u64 value = 2;							\
	asm volatile(ALTERNATIVE("xorl %k0, %k0; addl $0x1000, %k0; subl $0xfff, %k0", \
		"nop", feature) : "+r" (value));			\
	value; })
#define NOTHING(feature) ({						\
	u64 value = 2;							\
	asm volatile(ALTERNATIVE("movl $1, %k0", "", feature) : "+r" (value)); \
	value; })

static noinline __used u64 locus_alt_one(void)
{
	return 1;
}

static noinline __used u64 locus_alt_two(void)
{
	return 2;
}

#define CALL(feature) ({						\
	u64 value;							\
	asm volatile(ALTERNATIVE("call locus_alt_one", "call locus_alt_two", feature) \
		: "=a" (value), ASM_CALL_CONSTRAINT			\
		:: "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc"); \
	value; })
/* A call of the kernel's comes in the place of nothing. */
#define KERNEL_CALL(feature) ({						\
	u64 value = 0;							\
	asm volatile(ALTERNATIVE("xorl %%eax, %%eax", "call ktime_get", feature) \
		: "+a" (value), ASM_CALL_CONSTRAINT			\
		:: "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc"); \
	value; })

/* 1; 2 with the first feature; 3 with the second, whatever the first. */
#define TWO(first, second) ({						\
	u64 value;							\
	asm volatile(ALTERNATIVE_2("movl $1, %k0", "movl $2, %k0", first,	\
		"movl $4, %k0; decl %k0", second) : "=r" (value));	\
	value; })

#define EACH(m, feature) do {						\
	u64 expected = 1 + has(feature);				\
									\
	tell(m, #feature " same length", SAME(feature), expected);	\
	tell(m, #feature " longer", LONGER(feature), expected);	\
	tell(m, #feature " shorter", SHORTER(feature), expected);	\
	tell(m, #feature " nothing", NOTHING(feature), expected);	\
	tell(m, #feature " call", CALL(feature), expected);		\
	tell(m, #feature " kernel call", !!KERNEL_CALL(feature), has(feature)); \
	tell(m, #feature " static_cpu_has", static_cpu_has(feature), has(feature)); \
} while (0)

static noinline void locus_alt_pages(struct seq_file *m)
{
	u8 *page = (u8 *)__get_free_page(GFP_KERNEL);

	if (!page) {
		seq_puts(m, "clear_page: no memory\n");
		return;
	}
	memset(page, 0x5a, PAGE_SIZE);
	clear_page(page);
	tell(m, "clear_page", !memchr_inv(page, 0, PAGE_SIZE), 1);
	free_page((unsigned long)page);
}

static int locus_alt_show(struct seq_file *m, void *v)
{
	EACH(m, ALWAYS);
	EACH(m, NEVER);
	EACH(m, X86_FEATURE_REP_GOOD);
	EACH(m, X86_FEATURE_SMAP);
	EACH(m, X86_FEATURE_XENPV);
	tell(m, "ALWAYS is set", has(ALWAYS), 1);
	tell(m, "NEVER is not", has(NEVER), 0);
	tell(m, "two: none", TWO(NEVER, NEVER), 1);
	tell(m, "two: first", TWO(ALWAYS, NEVER), 2);
	tell(m, "two: second", TWO(NEVER, ALWAYS), 3);
	tell(m, "two: both", TWO(ALWAYS, ALWAYS), 3);
#ifdef ALT_NOT
	tell(m, "not ALWAYS", SAME(ALT_NOT(ALWAYS)), 1);
	tell(m, "not NEVER", SAME(ALT_NOT(NEVER)), 2);
#endif
	barrier_nospec();
	smp_mb();
	locus_alt_pages(m);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_alt_show));
MODULE_DESCRIPTION("Test: alternatives, taken and not taken");
