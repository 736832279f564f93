// SPDX-License-Identifier: GPL-2.0-only
/*
 * Static calls of the kernel's that change at run time: /sys/kernel/debug/sched/preempt says what
 * cond_resched() and might_resched() are. One call names the key, the other only the trampoline, as
 * modules do. Reading /proc/cmdline makes both, and tells where they lead, through the call's
 * trampoline if need be: the function called, "nothing" for what returns zero.
 */
#include <linux/sched.h>
#include <linux/static_call.h>

#include "../payload.h"

/*
 * The call lies between two labels. The compiler may move other code in between, but neither of what is
 * looked for is part of such code here.
 */
#define SITE(name, call)						\
	extern const u8 locus_##name##_begin[], locus_##name##_end[];	\
	static noinline void locus_##name(void)				\
	{								\
		asm volatile("locus_" #name "_begin:" ::: "memory");	\
		call;							\
		asm volatile("locus_" #name "_end:" ::: "memory");	\
	}

#ifdef CONFIG_HAVE_PREEMPT_DYNAMIC_CALL
SITE(with_key, (void)static_call(cond_resched)())
SITE(with_tramp, static_call_mod(might_resched)())
#else
SITE(with_key, cond_resched())
SITE(with_tramp, might_resched())
#endif

/* Where a call of a trampoline ends. */
static const u8 *behind(const u8 *to)
{
	return *to == 0xe9 ? to + 5 + *(const s32 *)(to + 1) : to;
}

static void describe(struct seq_file *m, const char *name, const u8 *at, const u8 *end)
{
	static const u8 zero[][5] = {
		{ 0x2e, 0x2e, 0x2e, 0x31, 0xc0 },
		{ 0x66, 0x66, 0x48, 0x31, 0xc0 },
	};

	for (; at + 5 <= end; at++) {
		if (!memcmp(at, zero[0], 5) || !memcmp(at, zero[1], 5)) {
			seq_printf(m, "%s: nothing\n", name);
			return;
		}
		if (*at == 0xe8) {
			at = behind(at + 5 + *(const s32 *)(at + 1));
#ifdef LOCUS_RETURN0
			if (at == (const u8 *)&__static_call_return0) {
				seq_printf(m, "%s: nothing\n", name);
				return;
			}
#endif
			seq_printf(m, "%s: %ps\n", name, at);
			return;
		}
	}
	seq_printf(m, "%s: no call\n", name);
}

static int locus_staticcall_show(struct seq_file *m, void *v)
{
	locus_with_key();
	locus_with_tramp();
	describe(m, "with key", locus_with_key_begin, locus_with_key_end);
	describe(m, "with trampoline", locus_with_tramp_begin, locus_with_tramp_end);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_staticcall_show));
MODULE_DESCRIPTION("Test: static calls that change");
