// SPDX-License-Identifier: GPL-2.0-only
/*
 * One of the two functions that locus_stack_two replaces.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int locus_stack_three_cmdline(struct seq_file *m, void *v)
{
	seq_puts(m, saved_command_line);
	seq_puts(m, " locus=three\n");
	return 0;
}

static struct klp_func locus_stack_three_funcs[] = {
	{
		.old_name = "cmdline_proc_show",
		.new_func = locus_stack_three_cmdline,
	},
	{ }
};

static struct klp_object locus_stack_three_objs[] = {
	{
		.funcs = locus_stack_three_funcs,
	},
	{ }
};

static struct klp_patch locus_stack_three_patch = {
	.mod = THIS_MODULE,
	.objs = locus_stack_three_objs,
};

static int __init locus_stack_three_init(void)
{
	return klp_enable_patch(&locus_stack_three_patch);
}

static void __exit locus_stack_three_exit(void)
{
}

module_init(locus_stack_three_init);
module_exit(locus_stack_three_exit);
MODULE_DESCRIPTION("Test: one of the two functions that locus_stack_two replaces");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
