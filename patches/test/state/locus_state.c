// SPDX-License-Identifier: GPL-2.0-only
/*
 * Variables keep what was written to them from one call to the next: zeroed ones, initialised ones,
 * those the kernel keeps apart, and a variable of one function. Reading /proc/cmdline counts them
 * up, and /proc/version shows them without.
 */
#include <linux/cache.h>

#include "../payload.h"

static unsigned int locus_zero;
static unsigned int locus_hundred = 100;
static unsigned int locus_mostly __read_mostly = 200;
static unsigned int locus_aligned __cacheline_aligned = 300;
static unsigned int locus_after_init __ro_after_init = 400;
static const unsigned int locus_constant = 500;
static char locus_letters[] = "a...............";
static u8 locus_room[8000];

static unsigned int *locus_calls(void)
{
	static unsigned int calls;

	return &calls;
}

static int locus_state_show(struct seq_file *m, void *v)
{
	seq_printf(m, "zero=%u hundred=%u mostly=%u aligned=%u after_init=%u constant=%u calls=%u ",
		   locus_zero, locus_hundred, READ_ONCE(locus_mostly), locus_aligned,
		   READ_ONCE(locus_after_init), READ_ONCE(locus_constant), *locus_calls());
	seq_printf(m, "letters=%s room=%u,%u\n", locus_letters, locus_room[0], locus_room[7999]);
	return 0;
}

static int locus_state_count(struct seq_file *m, void *v)
{
	locus_zero++;
	locus_hundred++;
	locus_mostly++;
	locus_aligned++;
	++*locus_calls();
	locus_letters[locus_zero % (sizeof(locus_letters) - 1)] = 'b';
	locus_room[0]++;
	locus_room[7999]--;
	return locus_state_show(m, v);
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_state_count),
	REPLACE("version_proc_show", locus_state_show));
MODULE_DESCRIPTION("Test: variables that keep their values");
