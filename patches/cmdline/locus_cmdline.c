// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace cmdline_proc_show() (fs/proc/cmdline.c), so that /proc/cmdline shows
 * the kernel's command line followed by a word that was never booted with.
 *
 * The simplest payload there is: one object (the kernel itself), one function,
 * one reference to data that the kernel does not export (saved_command_line).
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int locus_cmdline_proc_show(struct seq_file *m, void *v)
{
	seq_puts(m, saved_command_line);
	seq_puts(m, " locus=live\n");
	return 0;
}

static struct klp_func locus_cmdline_funcs[] = {
	{
		.old_name = "cmdline_proc_show",
		.new_func = locus_cmdline_proc_show,
	},
	{ }
};

static struct klp_object locus_cmdline_objs[] = {
	{
		/* No name: the functions are in the kernel itself. */
		.funcs = locus_cmdline_funcs,
	},
	{ }
};

static struct klp_patch locus_cmdline_patch = {
	.mod = THIS_MODULE,
	.objs = locus_cmdline_objs,
};

static int locus_cmdline_init(void)
{
	return klp_enable_patch(&locus_cmdline_patch);
}

static void locus_cmdline_exit(void)
{
}

module_init(locus_cmdline_init);
module_exit(locus_cmdline_exit);
MODULE_DESCRIPTION("Append locus=live to /proc/cmdline");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
