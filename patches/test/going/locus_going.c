// SPDX-License-Identifier: GPL-2.0-only
/*
 * An ordinary kernel module that takes its time to go: while its exit function sleeps it is neither live nor gone, and the
 * kernel holds no lock. A payload calls what it exports.
 */
#include <linux/delay.h>
#include <linux/export.h>
#include <linux/init.h>
#include <linux/module.h>

static unsigned int delay;
module_param(delay, uint, 0644);
MODULE_PARM_DESC(delay, "How long the exit function sleeps, in milliseconds");

int locus_going_helper(void);

int locus_going_helper(void)
{
	return 42;
}
EXPORT_SYMBOL_GPL(locus_going_helper);

static int __init locus_going_init(void)
{
	return 0;
}

static void __exit locus_going_exit(void)
{
	msleep(delay);
}

module_init(locus_going_init);
module_exit(locus_going_exit);
MODULE_DESCRIPTION("Test: a module that is slow to go");
MODULE_LICENSE("GPL");
