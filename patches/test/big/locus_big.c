// SPDX-License-Identifier: GPL-2.0-only
/*
 * One mebibyte of variables: more than the pages that any guest has to spare.
 */
#include <linux/sizes.h>

#include "../payload.h"

#define LAST (SZ_1M - 1)

static u8 locus_data[SZ_1M] = { [0] = 1, [SZ_1M / 2] = 2, [LAST] = 3 };

static int locus_big_show(struct seq_file *m, void *v)
{
	unsigned long sum = 0;
	int i;

	for (i = 0; i < SZ_1M; i++)
		sum += READ_ONCE(locus_data[i]);
	seq_printf(m, "sum=%lu first=%u last=%u\n", sum, locus_data[0], locus_data[LAST]);
	locus_data[LAST]++;
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_big_show));
MODULE_DESCRIPTION("Test: a mebibyte of data");
