// SPDX-License-Identifier: GPL-2.0-only
/*
 * A bit of everything that has to be prepared: alternatives, an exception table, a warning that is
 * never given, static keys, a tracepoint, a static call, locks, and variables. Made to come and go
 * many times.
 */
#include <linux/filter.h>
#include <linux/jump_label.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <asm/barrier.h>
#include <trace/events/power.h>

#include "../payload.h"

static DEFINE_SPINLOCK(locus_lock);
static DEFINE_STATIC_KEY_TRUE(locus_on);
static unsigned long locus_reads;
static unsigned long locus_words[] = { 1, 2, 3 };

static noinline int locus_read(const unsigned long __user *from, unsigned long *value)
{
	if (!user_access_begin(from, sizeof(*from)))
		return -EPERM;
	unsafe_get_user(*value, from, fault);
	user_access_end();
	return 0;
fault:
	user_access_end();
	return -EFAULT;
}

static int locus_mixed_show(struct seq_file *m, void *v)
{
	unsigned long value = 0, flags;
	int on = 0;

	might_sleep();
	barrier_nospec();
	spin_lock_irqsave(&locus_lock, flags);
	locus_reads++;
	value = locus_words[locus_reads % 3];
	spin_unlock_irqrestore(&locus_lock, flags);
	WARN_ON(!locus_reads);
	if (static_branch_likely(&locus_on))
		on = 1;
	trace_cpu_frequency(4712, 1);
	tell(m, "data", value, locus_reads % 3 + 1);
	tell(m, "own key", on, 1);
	on = 0;
	if (static_branch_unlikely(&bpf_stats_enabled_key))
		on = 1;
	tell(m, "kernel's key", on, static_key_enabled(&bpf_stats_enabled_key));
	tell(m, "bad read", locus_read((void __user *)0x1000, &value), -EFAULT);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_mixed_show));
MODULE_DESCRIPTION("Test: a bit of everything");
