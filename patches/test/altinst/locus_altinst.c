// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace cmdline_proc_show() by code with an alternative in it: an entry in
 * .altinstructions that the kernel's module loader settles for the CPU it runs
 * on. A loader that leaves it alone runs the wrong instruction, so it has to
 * apply the entry or refuse the payload by name.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <asm/barrier.h>

static int locus_altinst_show(struct seq_file *m, void *v)
{
	/* Nothing, or lfence where the CPU has it serialising. */
	barrier_nospec();
	seq_puts(m, saved_command_line);
	seq_puts(m, " locus=altinst\n");
	return 0;
}

static struct klp_func locus_altinst_funcs[] = {
	{
		.old_name = "cmdline_proc_show",
		.new_func = locus_altinst_show,
	},
	{ }
};

static struct klp_object locus_altinst_objs[] = {
	{
		.funcs = locus_altinst_funcs,
	},
	{ }
};

static struct klp_patch locus_altinst_patch = {
	.mod = THIS_MODULE,
	.objs = locus_altinst_objs,
};

static int locus_altinst_init(void)
{
	return klp_enable_patch(&locus_altinst_patch);
}

static void locus_altinst_exit(void)
{
}

module_init(locus_altinst_init);
module_exit(locus_altinst_exit);
MODULE_DESCRIPTION("Test: replacement code with an alternative");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
