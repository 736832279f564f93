/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * LOCUS_MANY functions at once: 1, 10, 100 or 300. Nobody calls most of them in a virtual machine, and
 * who does is told that there is no such device; reading /proc/cmdline (it alone, of 1), /proc/version or
 * /proc/loadavg shows that three of them are in force, and how many calls there were of the others.
 */
#include "payload.h"

static unsigned long locus_calls;
static unsigned int locus_last;

/* Each different from the others, lest the compiler make one of them all. */
#define X(name)								\
	static noinline long locus_##name(void)				\
	{								\
		locus_calls++;						\
		WRITE_ONCE(locus_last, __COUNTER__);			\
		return -ENODEV;						\
	}
#if LOCUS_MANY > 1
#include "many-names.h"
#endif
#undef X

static int locus_first_show(struct seq_file *m, void *v)
{
	seq_printf(m, "first %lu %u\n", locus_calls, locus_last);
	return 0;
}

#if LOCUS_MANY > 1
static int locus_second_show(struct seq_file *m, void *v)
{
	seq_printf(m, "second %lu %u\n", locus_calls, locus_last);
	return 0;
}

static int locus_third_show(struct seq_file *m, void *v)
{
	seq_printf(m, "third %lu %u\n", locus_calls, locus_last);
	return 0;
}
#endif

#define X(name) REPLACE(#name, locus_##name),
static struct klp_func locus_funcs[] = {
	REPLACE("cmdline_proc_show", locus_first_show),
#if LOCUS_MANY > 1
#include "many-names.h"
	REPLACE("version_proc_show", locus_second_show),
	REPLACE("loadavg_proc_show", locus_third_show),
#endif
	{ }
};

static struct klp_object locus_objs[] = {
	{ .funcs = locus_funcs }, { }
};

PAYLOAD_WITH(locus_objs);
MODULE_DESCRIPTION("Test: many functions");
