// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two functions, one of which another payload replaces too.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/utsname.h>

static int locus_stack_two_cmdline(struct seq_file *m, void *v)
{
	seq_puts(m, saved_command_line);
	seq_puts(m, " locus=two\n");
	return 0;
}

/* The banner ends its line, so the word is a line of its own. */
static int locus_stack_two_version(struct seq_file *m, void *v)
{
	seq_printf(m, linux_proc_banner,
		   utsname()->sysname,
		   utsname()->release,
		   utsname()->version);
	seq_puts(m, "locus=two\n");
	return 0;
}

static struct klp_func locus_stack_two_funcs[] = {
	{
		.old_name = "cmdline_proc_show",
		.new_func = locus_stack_two_cmdline,
	},
	{
		.old_name = "version_proc_show",
		.new_func = locus_stack_two_version,
	},
	{ }
};

static struct klp_object locus_stack_two_objs[] = {
	{
		.funcs = locus_stack_two_funcs,
	},
	{ }
};

static struct klp_patch locus_stack_two_patch = {
	.mod = THIS_MODULE,
	.objs = locus_stack_two_objs,
};

static int __init locus_stack_two_init(void)
{
	return klp_enable_patch(&locus_stack_two_patch);
}

static void __exit locus_stack_two_exit(void)
{
}

module_init(locus_stack_two_init);
module_exit(locus_stack_two_exit);
MODULE_DESCRIPTION("Test: two functions, one of which another payload replaces too");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
