/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A function in which somebody stays until he is released: the module locus_states has it, and its
 * patch the same once more.
 */
#ifndef LOCUS_TEST_STATES_H
#define LOCUS_TEST_STATES_H

#include <linux/atomic.h>
#include <linux/compiler.h>
#include <linux/processor.h>
#include <linux/timex.h>
#include <linux/wait.h>

/* In the order of the file too: a pointer to the function behind, on some stack, must not look like a
 * call at the end of this one.
 */
#define LOCUS_APART noinline __attribute__((__noipa__, __no_reorder__))

/* How to stay. */
enum locus_how { LOCUS_SPIN, LOCUS_SLEEP, LOCUS_SLEEP_DEEP, LOCUS_CALL };

struct locus_place {
	enum locus_how how;
	/* What LOCUS_CALL calls. */
	int (*callee)(struct locus_place *);
	bool released;
	/* Who spins gives up at this count of the CPU's cycles. */
	cycles_t end;
	wait_queue_head_t wait;
	atomic_t inside;
	/* Who has left the old function, and the new one. */
	atomic_t left[2];
};

int locus_states_target(void *place);
int locus_states_outer(void *place);

static __always_inline void locus_spin(struct locus_place *p)
{
	while (!READ_ONCE(p->released) && get_cycles() < p->end)
		cpu_relax();
}

/* All of it in the function it stands in: but for the calls it makes, nothing but its own address
 * shows that somebody is here.
 */
static __always_inline int locus_stay(struct locus_place *p, int version)
{
	int found = 0;

	atomic_inc(&p->inside);
	switch (p->how) {
	case LOCUS_SPIN:
		locus_spin(p);
		break;
	case LOCUS_SLEEP:
		found = wait_event_interruptible(p->wait, READ_ONCE(p->released));
		break;
	case LOCUS_SLEEP_DEEP:
		wait_event(p->wait, READ_ONCE(p->released));
		break;
	case LOCUS_CALL:
		found = p->callee(p);
		break;
	}
	atomic_dec(&p->inside);
	atomic_inc(&p->left[version]);
	return found;
}

#endif
