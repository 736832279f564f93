// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: its callbacks would have to be called in the guest when it is applied.
 */

#include "../payload.h"

static int locus_before(struct klp_object *obj)
{
	pr_info("before\n");
	return 0;
}

static int locus_callbacks_show(struct seq_file *m, void *v)
{
	seq_puts(m, "called\n");
	return 0;
}

static struct klp_func locus_funcs[] = {
	REPLACE("cmdline_proc_show", locus_callbacks_show), { }
};

static struct klp_object locus_objs[] = {
	{ .funcs = locus_funcs, .callbacks = { .pre_patch = locus_before } }, { }
};

PAYLOAD_WITH(locus_objs);
MODULE_DESCRIPTION("Test: callbacks");
