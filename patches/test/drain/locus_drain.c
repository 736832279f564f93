// SPDX-License-Identifier: GPL-2.0-only
/*
 * pause(2) replaced by the same, as in ../sleeper; and it says that a thread may go on sleeping in
 * either version.
 */
#include <linux/sched/signal.h>

#include "../payload.h"

static long locus_drain_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return -ERESTARTNOHAND;
}

PAYLOAD(REPLACE("__x64_sys_pause", locus_drain_pause));
MODULE_INFO(entry_only, "Y");
MODULE_DESCRIPTION("Test: old and new versions may run at the same time");
