// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: an address of the kernel's half does not fit into 32 bits without a sign.
 */

#include "../payload.h"

static int locus_overflow_show(struct seq_file *m, void *v)
{
	u64 value;

	asm("movl $saved_command_line, %k0" : "=r" (value));
	seq_printf(m, "%llx\n", value);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_overflow_show));
MODULE_DESCRIPTION("Test: a relocation that does not fit");
