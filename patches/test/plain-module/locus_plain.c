// SPDX-License-Identifier: GPL-2.0-only
/*
 * An ordinary kernel module, no live patch: the payload reader must say so.
 */
#include <linux/init.h>
#include <linux/module.h>

static int __init locus_plain_init(void)
{
	pr_info("loaded\n");
	return 0;
}

static void __exit locus_plain_exit(void)
{
	pr_info("unloaded\n");
}

module_init(locus_plain_init);
module_exit(locus_plain_exit);
MODULE_DESCRIPTION("Test: a module that is not a live patch");
MODULE_LICENSE("GPL");
