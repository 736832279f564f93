// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: a per-CPU variable of its own has to be allocated on each CPU of the guest.
 */
#include <linux/percpu.h>

#include "../payload.h"

static DEFINE_PER_CPU(unsigned int, locus_reads);

static int locus_own_percpu_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%u\n", this_cpu_inc_return(locus_reads));
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_own_percpu_show));
MODULE_DESCRIPTION("Test: a per-CPU variable of its own");
