// SPDX-License-Identifier: GPL-2.0-only
/*
 * The functions of the module locus_protocol, by the other rule.
 */
#include "../payload.h"
#include "../protocol.h"

static LOCUS_APART void locus_new_leaf(struct locus_walker *w)
{
	locus_leaf_by(w, 1);
}

static LOCUS_APART void locus_new_retake(struct locus_walker *w)
{
	locus_retake_by(w, 1);
}

static LOCUS_APART void locus_new_walk(struct locus_walker *w, unsigned int deep)
{
	/* By its old name, as code that is not replaced would call it. */
	locus_walk_by(w, deep, 1, locus_protocol_walk, locus_new_leaf);
}

static LOCUS_APART void locus_new_enter(struct locus_walker *w)
{
	locus_enter_by(w, 1, locus_new_walk, locus_protocol_retake);
}

PAYLOAD_OF("locus_protocol",
	   REPLACE("locus_protocol_enter", locus_new_enter),
	   REPLACE("locus_protocol_walk", locus_new_walk),
	   REPLACE("locus_protocol_leaf", locus_new_leaf),
	   REPLACE("locus_protocol_retake", locus_new_retake));
MODULE_DESCRIPTION("Test: another rule for a protocol");
