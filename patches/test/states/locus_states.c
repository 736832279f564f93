// SPDX-License-Identifier: GPL-2.0-only
/*
 * No patch: puts somebody inside locus_states_target(), in the state whose name is written to
 * /proc/locus_states, until "release" is written. Reading tells who is there. It can't be unloaded.
 *
 * What spins does so on CPU 1: the writer must not be there. Interrupts come a second after they
 * were asked for, and last ten at most: while one does, who waits for that CPU waits, and that may be
 * the next to write or read here.
 */
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/interrupt.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <asm/tsc.h>

#include "../states.h"

#define WRITER_CPU 0
#define BUSY_CPU 1
#define PATIENCE_MS 30000

static struct locus_place place;
static struct task_struct *created;
static bool probed;
/* Threads and interrupts that are not done. */
static atomic_t busy;

/* Nobody calls these, and no stack has their addresses. */
static LOCUS_APART __used void locus_states_gap(void)
{
}

LOCUS_APART int locus_states_target(void *p)
{
	return locus_stay(p, 0);
}

static LOCUS_APART __used void locus_states_next_gap(void)
{
}

LOCUS_APART int locus_states_outer(void *p)
{
	int found = locus_states_target(p);

	/* not the last thing it does: it stays on the stack */
	barrier();
	return found + 1;
}

static LOCUS_APART __used void locus_states_last_gap(void)
{
}

/* What the target calls, in the place of staying itself. */
static LOCUS_APART int locus_states_callee(struct locus_place *p)
{
	int found = wait_event_interruptible(p->wait, READ_ONCE(p->released));

	barrier();
	return found;
}

static LOCUS_APART void locus_states_elsewhere(void)
{
	locus_spin(&place);
}

static int in_target(void *unused)
{
	locus_states_target(&place);
	atomic_dec(&busy);
	return 0;
}

static int in_outer(void *unused)
{
	locus_states_outer(&place);
	atomic_dec(&busy);
	return 0;
}

static int in_elsewhere(void *unused)
{
	locus_states_elsewhere();
	atomic_dec(&busy);
	return 0;
}

static void interrupt_target(void *unused)
{
	locus_states_target(&place);
	atomic_dec(&busy);
}

static void interrupt_elsewhere(void *unused)
{
	locus_states_elsewhere();
	atomic_dec(&busy);
}

static void softirq_target(struct tasklet_struct *unused)
{
	locus_states_target(&place);
	atomic_dec(&busy);
}

static DECLARE_TASKLET(tasklet, softirq_target);

static void raise_tasklet(void *unused)
{
	tasklet_schedule(&tasklet);
}

static int come_back(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	return 0;
}

static struct kretprobe probe = {
	.kp.symbol_name = "locus_states_callee",
	.handler = come_back,
	.maxactive = 4,
};

static int start(int (*thread)(void *), const char *name, bool pinned, int nice)
{
	struct task_struct *task = kthread_create(thread, &place, "at-%s", name);

	if (IS_ERR(task))
		return PTR_ERR(task);
	if (pinned)
		kthread_bind(task, BUSY_CPU);
	if (nice)
		set_user_nice(task, nice);
	atomic_inc(&busy);
	wake_up_process(task);
	return 0;
}

static void (*handler)(void *);

static int interrupt_later(void *unused)
{
	int err;

	msleep(1000);
	place.end = get_cycles() + 10000ull * tsc_khz;
	err = smp_call_function_single(BUSY_CPU, handler, NULL, 0);
	if (err)
		atomic_dec(&busy);
	return err;
}

static int interrupt(void (*with)(void *))
{
	struct task_struct *task = kthread_create(interrupt_later, NULL, "later");

	if (IS_ERR(task))
		return PTR_ERR(task);
	handler = with;
	kthread_bind(task, WRITER_CPU);
	atomic_inc(&busy);
	wake_up_process(task);
	return 0;
}

static int until(atomic_t *count, int wanted)
{
	int left;

	for (left = PATIENCE_MS; atomic_read(count) != wanted && left > 0; left -= 10)
		msleep(10);
	return left > 0 ? 0 : -ETIMEDOUT;
}

static int release(void)
{
	int err;

	WRITE_ONCE(place.released, true);
	wake_up_all(&place.wait);
	if (created)
		wake_up_process(created);
	created = NULL;
	err = until(&busy, 0);
	if (probed)
		unregister_kretprobe(&probe);
	probed = false;
	return err;
}

static int begin(const char *state)
{
	int err = 0;

	if (atomic_read(&busy) || created)
		return -EBUSY;
	if (raw_smp_processor_id() == BUSY_CPU)
		return -EINVAL;
	atomic_set(&place.left[0], 0);
	atomic_set(&place.left[1], 0);
	place.released = false;
	/* longer than any test, but for what can't be preempted */
	place.end = get_cycles() + 600000ull * tsc_khz;
	place.callee = locus_states_callee;
	place.how = LOCUS_SLEEP;
	if (!strcmp(state, "sleeping"))
		return start(in_target, state, false, 0);
	if (!strcmp(state, "beneath")) {
		place.how = LOCUS_CALL;
		return start(in_outer, state, false, 0);
	}
	if (!strcmp(state, "calling")) {
		place.how = LOCUS_CALL;
		return start(in_target, state, false, 0);
	}
	if (!strcmp(state, "probed")) {
		place.how = LOCUS_CALL;
		/* registering refuses what has an address already */
		memset(&probe.kp, 0, sizeof(probe.kp));
		probe.kp.symbol_name = "locus_states_callee";
		err = register_kretprobe(&probe);
		if (err)
			return err;
		probed = true;
		return start(in_target, state, false, 0);
	}
	/* the writer himself */
	if (!strcmp(state, "process"))
		return locus_states_target(&place);
	if (!strcmp(state, "created")) {
		created = kthread_create(locus_states_target, &place, "at-%s", state);
		err = PTR_ERR_OR_ZERO(created);
		if (err)
			created = NULL;
		return err;
	}
	/* A signal cuts the writer's system call short. It must end him then. */
	if (!strcmp(state, "restarting")) {
		wait_event_interruptible(place.wait, READ_ONCE(place.released));
		return set_restart_fn(&current->restart_block, (void *)locus_states_target);
	}
	place.how = LOCUS_SLEEP_DEEP;
	if (!strcmp(state, "deep"))
		return start(in_target, state, false, 0);
	place.how = LOCUS_SPIN;
	if (!strcmp(state, "running"))
		return start(in_target, state, true, 0);
	if (!strcmp(state, "preempted")) {
		err = start(in_target, state, true, 19);
		err = err ?: until(&place.inside, 1);
		return err ?: start(in_elsewhere, "hog", true, -20);
	}
	if (!strcmp(state, "interrupted")) {
		err = start(in_target, state, true, 0);
		err = err ?: until(&place.inside, 1);
		return err ?: interrupt(interrupt_elsewhere);
	}
	if (!strcmp(state, "interrupt"))
		return interrupt(interrupt_target);
	if (!strcmp(state, "elsewhere"))
		return interrupt(interrupt_elsewhere);
	if (!strcmp(state, "softirq"))
		return interrupt(raise_tasklet);
	return -ENOENT;
}

static ssize_t control(struct file *file, const char __user *from, size_t len, loff_t *at)
{
	char word[16];
	int err;

	if (len >= sizeof(word) || copy_from_user(word, from, len))
		return -EINVAL;
	word[len] = 0;
	strim(word);
	err = strcmp(word, "release") ? begin(word) : release();
	return err ? err : len;
}

static int show(struct seq_file *m, void *v)
{
	seq_printf(m, "inside %d busy %d old %d new %d\n", atomic_read(&place.inside),
		   atomic_read(&busy), atomic_read(&place.left[0]), atomic_read(&place.left[1]));
	return 0;
}

static int open(struct inode *inode, struct file *file)
{
	return single_open(file, show, NULL);
}

static const struct proc_ops ops = {
	.proc_open = open,
	.proc_read = seq_read,
	.proc_write = control,
	.proc_lseek = seq_lseek,
	.proc_release = single_release,
};

static int __init locus_states_init(void)
{
	init_waitqueue_head(&place.wait);
	return proc_create("locus_states", 0600, NULL, &ops) ? 0 : -ENOMEM;
}

module_init(locus_states_init);
MODULE_DESCRIPTION("Test: somebody inside a function, in the state that is wished for");
MODULE_LICENSE("GPL");
