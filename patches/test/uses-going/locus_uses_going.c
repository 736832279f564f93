// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace cmdline_proc_show() by a function that calls module locus_going, and pause(2) by the same: so a sleeper
 * makes the tool wait, and the module may go meanwhile.
 */
#include <linux/sched.h>
#include <linux/sched/signal.h>

#include "../payload.h"

int locus_going_helper(void);

static int locus_uses_going_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%s locus=%d\n", saved_command_line, locus_going_helper());
	return 0;
}

static long locus_uses_going_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return -ERESTARTNOHAND;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_uses_going_show),
	REPLACE("__x64_sys_pause", locus_uses_going_pause));
MODULE_DESCRIPTION("Test: uses a module that goes");
