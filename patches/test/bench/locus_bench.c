// SPDX-License-Identifier: GPL-2.0-only
/*
 * No patch: reading /proc/locus_bench calls a function a million times and tells how many picoseconds
 * one call took, eleven times over.
 */
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

#include "../bench.h"

#define CALLS 1000000
#define TIMES 11

LOCUS_APART unsigned long locus_bench_target(unsigned long n)
{
	return locus_bench_body(n);
}

/* Nobody calls it, and no stack has its address. */
static LOCUS_APART __used void locus_bench_gap(void)
{
}

static int show(struct seq_file *m, void *v)
{
	unsigned long n, sum = 0;
	unsigned int time;

	for (time = 0; time < TIMES; time++) {
		u64 began = ktime_get_ns();

		for (n = 0; n < CALLS; n++)
			sum += locus_bench_target(n);
		seq_printf(m, "%llu\n", div_u64((ktime_get_ns() - began) * 1000, CALLS));
		cond_resched();
	}
	/* Else the calls would be for nothing. */
	return sum ? 0 : -EINVAL;
}

static int __init locus_bench_init(void)
{
	return proc_create_single("locus_bench", 0, NULL, show) ? 0 : -ENOMEM;
}

static void __exit locus_bench_exit(void)
{
	remove_proc_entry("locus_bench", NULL);
}

module_init(locus_bench_init);
module_exit(locus_bench_exit);
MODULE_DESCRIPTION("Bench: what a call costs");
MODULE_LICENSE("GPL");
