// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace the system call pause(2), in which a thread sleeps until a signal comes: so a sleeper in
 * the old function blocks applying, and one in the new function blocks reverting.
 */
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>

static long locus_sleeper_pause(const struct pt_regs *regs)
{
	while (!signal_pending(current)) {
		__set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return -ERESTARTNOHAND;
}

static struct klp_func locus_sleeper_funcs[] = {
	{
		.old_name = "__x64_sys_pause",
		.new_func = locus_sleeper_pause,
	},
	{ }
};

static struct klp_object locus_sleeper_objs[] = {
	{
		.funcs = locus_sleeper_funcs,
	},
	{ }
};

static struct klp_patch locus_sleeper_patch = {
	.mod = THIS_MODULE,
	.objs = locus_sleeper_objs,
};

static int __init locus_sleeper_init(void)
{
	return klp_enable_patch(&locus_sleeper_patch);
}

static void __exit locus_sleeper_exit(void)
{
}

module_init(locus_sleeper_init);
module_exit(locus_sleeper_exit);
MODULE_DESCRIPTION("Replace pause(2) by the same");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
