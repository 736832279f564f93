// SPDX-License-Identifier: GPL-2.0-only
/*
 * A tracepoint of the kernel's, power:cpu_frequency, which nothing in a virtual machine hits: reading
 * /proc/cmdline hits it with the state 4711, and the tracepoint power:suspend_resume with a text of
 * the kernel's. (Texts of a module's own the kernel does not show for its tracepoints: trace_safe_str().)
 */
#include <trace/events/power.h>

#include "../payload.h"

extern const char locus_text[] __asm__("vermagic");

static int locus_tracepoint_show(struct seq_file *m, void *v)
{
	trace_cpu_frequency(4711, 1);
	trace_suspend_resume(locus_text, 815, true);
	seq_printf(m, "enabled=%d\n", trace_cpu_frequency_enabled());
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_tracepoint_show));
MODULE_DESCRIPTION("Test: hits tracepoints");
