// SPDX-License-Identifier: GPL-2.0-only
/*
 * Per-CPU variables of the kernel's: read by several ways, which must agree, and one is counted up:
 * each time /proc/cmdline is read, /proc/softirqs shows 1000 more under HI on the CPU that did it.
 */
#include <linux/kernel_stat.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <linux/smp.h>

#include "../payload.h"

static int locus_percpu_show(struct seq_file *m, void *v)
{
	unsigned long before, after, seen;
	struct task_struct *me, *mine;
	int cpu;

	preempt_disable();
	cpu = smp_processor_id();
	me = current;
	mine = (struct task_struct *)(unsigned long)me;
	before = per_cpu(kstat, cpu).softirqs[HI_SOFTIRQ];
	this_cpu_add(kstat.softirqs[HI_SOFTIRQ], 999);
	__this_cpu_inc(kstat.softirqs[HI_SOFTIRQ]);
	after = per_cpu(kstat, cpu).softirqs[HI_SOFTIRQ];
	seen = raw_cpu_ptr(&kstat)->softirqs[HI_SOFTIRQ];
	preempt_enable();

	tell(m, "current", mine->pid, task_pid_nr(current));
	tell(m, "cpu", cpu < nr_cpu_ids, 1);
	/* An interrupt may have added one or two. */
	tell(m, "counted", after - before >= 1000 && after - before < 1100, 1);
	tell(m, "this_cpu_ptr", seen - after < 100, 1);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_percpu_show));
MODULE_DESCRIPTION("Test: per-CPU variables of the kernel");
