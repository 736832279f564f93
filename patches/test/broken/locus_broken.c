// SPDX-License-Identifier: GPL-2.0-only
/*
 * No patch: breaks the kernel that it is loaded into, so that a test can show that the testbed notices.
 */
#include <linux/bug.h>
#include <linux/module.h>
#include <linux/string.h>

static char *what = "";
module_param(what, charp, 0444);
MODULE_PARM_DESC(what, "warn, or oops");

static int *volatile locus_nowhere;

static int __init locus_broken_init(void)
{
	if (!strcmp(what, "warn"))
		WARN(1, "locus_broken was told to warn\n");
	if (!strcmp(what, "oops"))
		*locus_nowhere = 1;
	return 0;
}

static void __exit locus_broken_exit(void)
{
}

module_init(locus_broken_init);
module_exit(locus_broken_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Test: breaks the kernel it is loaded into");
