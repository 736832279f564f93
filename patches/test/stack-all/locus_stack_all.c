// SPDX-License-Identifier: GPL-2.0-only
/*
 * A patch that supersedes all before it.
 *
 * /proc/cmdline is not among its functions: it gets the kernel's own code back.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/utsname.h>

/* The banner ends its line, so the word is a line of its own. */
static int locus_stack_all_version(struct seq_file *m, void *v)
{
	seq_printf(m, linux_proc_banner,
		   utsname()->sysname,
		   utsname()->release,
		   utsname()->version);
	seq_puts(m, "locus=all\n");
	return 0;
}

static struct klp_func locus_stack_all_funcs[] = {
	{
		.old_name = "version_proc_show",
		.new_func = locus_stack_all_version,
	},
	{ }
};

static struct klp_object locus_stack_all_objs[] = {
	{
		.funcs = locus_stack_all_funcs,
	},
	{ }
};

static struct klp_patch locus_stack_all_patch = {
	.mod = THIS_MODULE,
	.objs = locus_stack_all_objs,
	.replace = true,
};

static int __init locus_stack_all_init(void)
{
	return klp_enable_patch(&locus_stack_all_patch);
}

static void __exit locus_stack_all_exit(void)
{
}

module_init(locus_stack_all_init);
module_exit(locus_stack_all_exit);
MODULE_DESCRIPTION("Test: a patch that supersedes all before it");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
