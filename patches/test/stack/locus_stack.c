// SPDX-License-Identifier: GPL-2.0-only
/*
 * Threads that are found inside: one that reads /proc/cmdline sleeps, uninterruptible; one that reads
 * /proc/version keeps its CPU busy until it is sent a signal, and then ends the other's sleep. Neither
 * stays longer than ten minutes.
 */
#include <linux/jiffies.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>

#include "../payload.h"

static bool locus_told;

static noinline void locus_stack_sleep(struct seq_file *m)
{
	unsigned long end = jiffies + 600 * HZ;

	while (!READ_ONCE(locus_told) && time_before(jiffies, end))
		schedule_timeout_uninterruptible(HZ / 10);
	WRITE_ONCE(locus_told, false);
	seq_puts(m, "slept\n");
}

static noinline void locus_stack_spin(struct seq_file *m)
{
	unsigned long end = jiffies + 600 * HZ;

	while (!signal_pending(current) && time_before(jiffies, end))
		cond_resched();
	WRITE_ONCE(locus_told, true);
	seq_puts(m, "spun\n");
}

static int locus_stack_sleeper(struct seq_file *m, void *v)
{
	locus_stack_sleep(m);
	seq_puts(m, "woke up\n");
	return 0;
}

static int locus_stack_spinner(struct seq_file *m, void *v)
{
	locus_stack_spin(m);
	seq_puts(m, "was told\n");
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_stack_sleeper),
	REPLACE("version_proc_show", locus_stack_spinner));
MODULE_DESCRIPTION("Test: threads inside replacement code");
