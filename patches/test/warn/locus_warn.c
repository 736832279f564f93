// SPDX-License-Identifier: GPL-2.0-only
/*
 * Warnings in replacement code: reading /proc/cmdline warns each time, and once more the first time.
 * What is read are the lines at which the kernel's log must say it was.
 */
#include <linux/bug.h>

#include "../payload.h"

static noinline int locus_warn_inner(void)
{
	WARN(1, "locus warns"); return __LINE__;
}

static noinline int locus_warn_once(void)
{
	WARN_ON_ONCE(1); return __LINE__;
}

static int locus_warn_show(struct seq_file *m, void *v)
{
	int line = locus_warn_inner();

	seq_printf(m, "warn %d\n", line);
	line = locus_warn_once();
	seq_printf(m, "once %d\n", line);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_warn_show));
MODULE_DESCRIPTION("Test: warnings in replacement code");
