// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace cmdline_proc_show() by code with a static call of its own: the key and
 * the trampoline stand in the payload, and only the kernel's module loader makes
 * them known, so that static_call_update() finds them. A loader that can't do the
 * same has to refuse the payload by name.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/static_call.h>

static int locus_own_static_call_first(struct seq_file *m)
{
	seq_puts(m, " locus=own_static_call\n");
	return 0;
}

DEFINE_STATIC_CALL(locus_own_static_call_end, locus_own_static_call_first);

static int locus_own_static_call_show(struct seq_file *m, void *v)
{
	seq_puts(m, saved_command_line);
	return static_call(locus_own_static_call_end)(m);
}

static struct klp_func locus_own_static_call_funcs[] = {
	{
		.old_name = "cmdline_proc_show",
		.new_func = locus_own_static_call_show,
	},
	{ }
};

static struct klp_object locus_own_static_call_objs[] = {
	{
		.funcs = locus_own_static_call_funcs,
	},
	{ }
};

static struct klp_patch locus_own_static_call_patch = {
	.mod = THIS_MODULE,
	.objs = locus_own_static_call_objs,
};

static int locus_own_static_call_init(void)
{
	return klp_enable_patch(&locus_own_static_call_patch);
}

static void locus_own_static_call_exit(void)
{
}

module_init(locus_own_static_call_init);
module_exit(locus_own_static_call_exit);
MODULE_DESCRIPTION("Test: replacement code with a static call of its own");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
