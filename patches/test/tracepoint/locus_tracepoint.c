// SPDX-License-Identifier: GPL-2.0-only
/*
 * A tracepoint of the kernel's, power:cpu_frequency, which nothing in a virtual machine hits: reading
 * /proc/cmdline hits it with the state 4711, and with a text in the payload's constants the
 * tracepoint power:suspend_resume.
 */
#include <trace/events/power.h>

#include "../payload.h"

static int locus_tracepoint_show(struct seq_file *m, void *v)
{
	trace_cpu_frequency(4711, 1);
	trace_suspend_resume("locus_action", 815, true);
	seq_printf(m, "enabled=%d\n", trace_cpu_frequency_enabled());
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_tracepoint_show));
MODULE_DESCRIPTION("Test: hits tracepoints");
