// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: a static call of its own has a trampoline, which has to be registered.
 */
#include <linux/static_call.h>

#include "../payload.h"

static int locus_called(void)
{
	return 1;
}

static int locus_called_later(void)
{
	return 2;
}

DEFINE_STATIC_CALL(locus_call, locus_called);

static int locus_own_static_call_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%d\n", static_call(locus_call)());
	static_call_update(locus_call, locus_called_later);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_own_static_call_show));
MODULE_DESCRIPTION("Test: a static call of its own");
