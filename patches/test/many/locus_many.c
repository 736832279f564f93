// SPDX-License-Identifier: GPL-2.0-only
/*
 * Three hundred functions at once. Nobody calls most of them in a virtual machine, and who does is told
 * that there is no such device; reading /proc/cmdline, /proc/version or /proc/loadavg shows that three
 * of them are in force, and how many calls there were of the others.
 */
#include "../payload.h"

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
#include "names.h"
#undef X

static int locus_first_show(struct seq_file *m, void *v)
{
	seq_printf(m, "first %lu %u\n", locus_calls, locus_last);
	return 0;
}

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

#define X(name) REPLACE(#name, locus_##name),
static struct klp_func locus_funcs[] = {
	REPLACE("cmdline_proc_show", locus_first_show),
#include "names.h"
	REPLACE("version_proc_show", locus_second_show),
	REPLACE("loadavg_proc_show", locus_third_show),
	{ }
};

static struct klp_object locus_objs[] = {
	{ .funcs = locus_funcs }, { }
};

PAYLOAD_WITH(locus_objs);
MODULE_DESCRIPTION("Test: three hundred functions");
