// SPDX-License-Identifier: GPL-2.0-only
/*
 * The patch of patches/cmdline/ in the form that kpatch-build gives to modules: the functions stand
 * in the table .kpatch.funcs, and module_init makes a struct klp_patch from it.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

static int __used locus_kpatch_show(struct seq_file *m, void *v)
{
	seq_puts(m, saved_command_line);
	seq_puts(m, " locus=kpatch\n");
	return 0;
}
asm(".pushsection .text\n"
    "locus_kpatch_end:\n"
    "	.popsection\n");

/* kmod/patch/kpatch-patch.h of kpatch */
struct kpatch_patch_func {
	unsigned long new_addr;
	unsigned long new_size;
	unsigned long old_addr;
	unsigned long old_size;
	unsigned long sympos;
	const char *name;
	const char *objname;
};

/*
 * kpatch-build writes these sections itself. The size of the function stands in the table; C can't
 * tell it, the assembler can.
 */
#define KPATCH_STRINGS __section(".kpatch.strings") __used
static const char kpatch_name[] KPATCH_STRINGS = "cmdline_proc_show";
static const char kpatch_object[] KPATCH_STRINGS = "vmlinux";

extern struct kpatch_patch_func kpatch_funcs[], kpatch_funcs_end[];
asm(".pushsection .kpatch.funcs, \"a\"\n"
    "kpatch_funcs:\n"
    "	.quad locus_kpatch_show\n"
    "	.quad locus_kpatch_end - locus_kpatch_show\n"
    "	.quad 0, 0, 1\n"
    "	.quad kpatch_name, kpatch_object\n"
    "kpatch_funcs_end:\n"
    "	.popsection\n");

static struct klp_patch *patch;

static int __init locus_kpatch_init(void)
{
	struct klp_object *object;
	struct klp_func *func;

	patch = kzalloc(sizeof(*patch), GFP_KERNEL);
	object = kcalloc(2, sizeof(*object), GFP_KERNEL);
	func = kcalloc(2, sizeof(*func), GFP_KERNEL);
	if (!patch || !object || !func) {
		kfree(patch);
		kfree(object);
		kfree(func);
		return -ENOMEM;
	}
	func->old_name = kpatch_funcs->name;
	func->new_func = (void *)kpatch_funcs->new_addr;
	func->old_sympos = kpatch_funcs->sympos;
	object->funcs = func;
	patch->mod = THIS_MODULE;
	patch->objs = object;
	patch->replace = true;
	return klp_enable_patch(patch);
}

static void __exit locus_kpatch_exit(void)
{
}

module_init(locus_kpatch_init);
module_exit(locus_kpatch_exit);
MODULE_DESCRIPTION("A module in the form that kpatch-build gives to them");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
