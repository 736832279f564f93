// SPDX-License-Identifier: GPL-2.0-only
/*
 * Each read of /proc/cmdline starts a static timer, which may still be pending when the payload is reverted and applied
 * again. Says how often it ran out.
 */
#include <linux/jiffies.h>
#include <linux/timer.h>

#include "../payload.h"

static unsigned int locus_fired;

static void locus_fire(struct timer_list *timer)
{
	locus_fired++;
}

static DEFINE_TIMER(locus_timer, locus_fire);

static int locus_timer_show(struct seq_file *m, void *v)
{
	mod_timer(&locus_timer, jiffies + 40 * HZ);
	seq_printf(m, "fired=%u\n", READ_ONCE(locus_fired));
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_timer_show));
MODULE_DESCRIPTION("Test: a timer that is pending");
