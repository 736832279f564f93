// SPDX-License-Identifier: GPL-2.0-only
/*
 * No patch: threads that enter, sleep in, are preempted in and leave the functions of ../protocol.h,
 * again and again, whatever stands behind the functions' names at the time. /proc/locus_protocol
 * counts. For good: it can't be unloaded.
 *
 * With as many threads as here somebody is always inside. So there is a gate, closed from time to
 * time for a random while: who is outside waits, who is inside leaves.
 */
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/kernel.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

#include "../protocol.h"

#define WALKERS 24

static struct locus_walker walkers[WALKERS];
static struct locus_walker gatekeeper = { .random = 0x9e3779b9 };
static bool open = true;

LOCUS_APART void locus_protocol_leaf(struct locus_walker *w)
{
	locus_leaf_by(w, 0);
}

LOCUS_APART void locus_protocol_retake(struct locus_walker *w)
{
	locus_retake_by(w, 0);
}
/* The patch calls two of them by name. */
EXPORT_SYMBOL_GPL(locus_protocol_retake);

LOCUS_APART void locus_protocol_walk(struct locus_walker *w, unsigned int deep)
{
	locus_walk_by(w, deep, 0, locus_protocol_walk, locus_protocol_leaf);
}
EXPORT_SYMBOL_GPL(locus_protocol_walk);

LOCUS_APART void locus_protocol_enter(struct locus_walker *w)
{
	locus_enter_by(w, 0, locus_protocol_walk, locus_protocol_retake);
}

/* Nobody calls it, and no stack has its address. */
static LOCUS_APART __used void locus_protocol_gap(void)
{
}

static int walk_about(void *data)
{
	struct locus_walker *w = data;

	for (;;) {
		while (!READ_ONCE(open))
			schedule_timeout_interruptible(1);
		locus_protocol_enter(w);
		w->rounds++;
		locus_linger(w);
	}
	return 0;
}

static int keep_gate(void *data)
{
	for (;;) {
		WRITE_ONCE(open, true);
		msleep(20 + locus_random(&gatekeeper, 150));
		WRITE_ONCE(open, false);
		msleep(20 + locus_random(&gatekeeper, 300));
	}
	return 0;
}

static int show(struct seq_file *m, void *v)
{
	unsigned long violations = 0, old = 0, new = 0;
	unsigned int n;

	for (n = 0; n < WALKERS; n++) {
		violations += READ_ONCE(walkers[n].violations);
		old += READ_ONCE(walkers[n].taken[0]);
		new += READ_ONCE(walkers[n].taken[1]);
	}
	seq_printf(m, "violations %lu\nold %lu\nnew %lu\nrounds", violations, old, new);
	for (n = 0; n < WALKERS; n++)
		seq_printf(m, " %lu", READ_ONCE(walkers[n].rounds));
	seq_puts(m, "\n");
	return 0;
}

static int __init locus_protocol_init(void)
{
	struct task_struct *task;
	unsigned int n;

	if (!proc_create_single("locus_protocol", 0, NULL, show))
		return -ENOMEM;
	for (n = 0; n < WALKERS; n++) {
		walkers[n].random = 0x2545f491 * (n + 1);
		task = kthread_create(walk_about, &walkers[n], "walker-%u", n);
		if (IS_ERR(task))
			return PTR_ERR(task);
		walkers[n].task = task;
	}
	task = kthread_run(keep_gate, NULL, "gatekeeper");
	if (IS_ERR(task))
		return PTR_ERR(task);
	for (n = 0; n < WALKERS; n++)
		wake_up_process(walkers[n].task);
	return 0;
}

module_init(locus_protocol_init);
MODULE_DESCRIPTION("Test: threads inside a set of functions that agree on a protocol");
MODULE_LICENSE("GPL");
