/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A set of functions that call each other and agree on how a token is held: the module
 * locus_protocol has them by rule 0, its patch by rule 1. A function of one rule that runs beneath
 * one of the other finds the token in the wrong place and counts a violation.
 */
#ifndef LOCUS_TEST_PROTOCOL_H
#define LOCUS_TEST_PROTOCOL_H

#include <linux/compiler.h>
#include <linux/sched.h>
#include <linux/types.h>

/* Called as a function by all, so that its replacement is met, and not counted on by the callers'
 * register allocation. In the order of the file: a thread's stack has a pointer to the function that
 * the thread began in, and if that followed one of these, the pointer would look like a call at its end.
 */
#define LOCUS_APART noinline __attribute__((__noipa__, __no_reorder__))

/* One thread; nobody else writes it. */
struct locus_walker {
	struct task_struct *task;
	u32 random;
	/* Held by each rule. */
	unsigned int tokens[2];
	unsigned long taken[2];
	unsigned long violations;
	unsigned long rounds;
};

void locus_protocol_enter(struct locus_walker *w);
void locus_protocol_walk(struct locus_walker *w, unsigned int deep);
void locus_protocol_leaf(struct locus_walker *w);
void locus_protocol_retake(struct locus_walker *w);

static __always_inline unsigned int locus_random(struct locus_walker *w, unsigned int below)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 17;
	w->random ^= w->random << 5;
	return w->random % below;
}

static __always_inline void locus_expect(struct locus_walker *w, int rule, unsigned int tokens)
{
	if (READ_ONCE(w->tokens[rule]) != tokens || READ_ONCE(w->tokens[!rule]))
		w->violations++;
}

/* A moment on the CPU, where others may take its place, or off it. */
static __always_inline void locus_linger(struct locus_walker *w)
{
	unsigned int n;

	switch (locus_random(w, 8)) {
	case 0:
		schedule_timeout_uninterruptible(1 + locus_random(w, 2));
		break;
	case 1:
		schedule_timeout_interruptible(1);
		break;
	case 2:
	case 3:
		schedule();
		break;
	default:
		for (n = locus_random(w, 1000); n; n--)
			cpu_relax();
	}
}

static __always_inline void locus_enter_by(struct locus_walker *w, int rule,
					   void (*walk)(struct locus_walker *, unsigned int),
					   void (*retake)(struct locus_walker *))
{
	unsigned int n;

	locus_expect(w, rule, 0);
	w->tokens[rule]++;
	w->taken[rule]++;
	for (n = 1 + locus_random(w, 2); n; n--) {
		locus_linger(w);
		walk(w, locus_random(w, 3));
	}
	locus_expect(w, rule, 1);
	retake(w);
	locus_expect(w, rule, 1);
	w->tokens[rule]--;
}

static __always_inline void locus_walk_by(struct locus_walker *w, unsigned int deep, int rule,
					  void (*walk)(struct locus_walker *, unsigned int),
					  void (*leaf)(struct locus_walker *))
{
	locus_expect(w, rule, 1);
	if (deep)
		walk(w, deep - 1);
	else
		leaf(w);
	locus_linger(w);
	locus_expect(w, rule, 1);
}

static __always_inline void locus_leaf_by(struct locus_walker *w, int rule)
{
	locus_expect(w, rule, 1);
	locus_linger(w);
	locus_expect(w, rule, 1);
}

/* Gives the token back and takes it again. */
static __always_inline void locus_retake_by(struct locus_walker *w, int rule)
{
	locus_expect(w, rule, 1);
	w->tokens[rule]--;
	locus_linger(w);
	w->tokens[rule]++;
	locus_expect(w, rule, 1);
}

#endif
