// SPDX-License-Identifier: GPL-2.0-only
/*
 * A payload that must be refused: it replaces a function that no kernel has.
 * Apart from that name it is complete and would link.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int locus_orphan_show(struct seq_file *m, void *v)
{
	seq_puts(m, "locus=orphan\n");
	return 0;
}

static struct klp_func locus_orphan_funcs[] = {
	{
		.old_name = "locus_no_such_function_show",
		.new_func = locus_orphan_show,
	},
	{ }
};

static struct klp_object locus_orphan_objs[] = {
	{
		.funcs = locus_orphan_funcs,
	},
	{ }
};

static struct klp_patch locus_orphan_patch = {
	.mod = THIS_MODULE,
	.objs = locus_orphan_objs,
};

static int locus_orphan_init(void)
{
	return klp_enable_patch(&locus_orphan_patch);
}

static void locus_orphan_exit(void)
{
}

module_init(locus_orphan_init);
module_exit(locus_orphan_exit);
MODULE_DESCRIPTION("Test: replaces a function that does not exist");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
