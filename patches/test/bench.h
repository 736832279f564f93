/* SPDX-License-Identifier: GPL-2.0-only */
/* What a call costs: the function that the module locus_bench calls, and its replacement alike. */
#ifndef LOCUS_TEST_BENCH_H
#define LOCUS_TEST_BENCH_H

#include <linux/compiler.h>

/* Called as a function by all, so that its replacement is met. */
#define LOCUS_APART noinline __attribute__((__noipa__, __no_reorder__))

unsigned long locus_bench_target(unsigned long n);

static __always_inline unsigned long locus_bench_body(unsigned long n)
{
	return n * 3 + 1;
}

#endif
