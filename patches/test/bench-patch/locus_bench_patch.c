// SPDX-License-Identifier: GPL-2.0-only
/* The function of the module locus_bench, by the same once more. */
#include "../payload.h"
#include "../bench.h"

static LOCUS_APART unsigned long locus_bench_new(unsigned long n)
{
	return locus_bench_body(n);
}

PAYLOAD_OF("locus_bench", REPLACE("locus_bench_target", locus_bench_new));
MODULE_DESCRIPTION("Bench: a function that is as it was");
