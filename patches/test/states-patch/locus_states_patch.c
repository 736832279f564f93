// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two functions of the module locus_states once more.
 */
#include "../payload.h"
#include "../states.h"

static LOCUS_APART int locus_new_target(void *p)
{
	return locus_stay(p, 1);
}

static LOCUS_APART __used void locus_new_gap(void)
{
}

static LOCUS_APART int locus_new_outer(void *p)
{
	int found = locus_new_target(p);

	barrier();
	return found + 2;
}

static LOCUS_APART __used void locus_new_next_gap(void)
{
}

PAYLOAD_OF("locus_states",
	   REPLACE("locus_states_target", locus_new_target),
	   REPLACE("locus_states_outer", locus_new_outer));
MODULE_DESCRIPTION("Test: a function in which somebody stays");
