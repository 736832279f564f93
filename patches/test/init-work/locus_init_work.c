// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: module_init sets a pointer, by way of a function in its own section, before it enables the
 * patch. module_init does not run from outside, so the new function would call NULL.
 */

#include "../payload.h"

static void (*locus_put)(struct seq_file *m, const char *text);

static int locus_init_work_show(struct seq_file *m, void *v)
{
	READ_ONCE(locus_put)(m, "set\n");
	return 0;
}

static noinline void __init locus_set_up(void)
{
	WRITE_ONCE(locus_put, seq_puts);
}

static struct klp_func payload_funcs[] = { REPLACE("cmdline_proc_show", locus_init_work_show), { } };
static struct klp_object payload_objs[] = { { .funcs = payload_funcs }, { } };
static struct klp_patch payload = { .mod = THIS_MODULE, .objs = payload_objs };

static int __init locus_init_work_init(void)
{
	locus_set_up();
	return klp_enable_patch(&payload);
}

static void __exit locus_init_work_exit(void)
{
}

module_init(locus_init_work_init);
module_exit(locus_init_work_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
MODULE_DESCRIPTION("Test: module_init does work that the new function relies on");
