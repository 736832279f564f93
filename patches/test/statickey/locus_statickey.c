// SPDX-License-Identifier: GPL-2.0-only
/*
 * Static keys: two of the kernel's that sysctls turn on and off (kernel.sched_schedstats and
 * kernel.bpf_stats_enabled), and the payload's own, one that begins on and one that begins off.
 * Reading /proc/cmdline compares each branch with its key; reading /proc/version turns the payload's
 * own keys.
 */
#include <linux/filter.h>
#include <linux/jump_label.h>

#include "../payload.h"

/* kernel/sched/stats.h */
extern struct static_key_false sched_schedstats;

static DEFINE_STATIC_KEY_TRUE(locus_begins_on);
static DEFINE_STATIC_KEY_FALSE(locus_begins_off);

#define BRANCH(name, key, how)						\
	static noinline int locus_##name##_##how(void)			\
	{								\
		if (static_branch_##how(&key))				\
			return 1;					\
		return 0;						\
	}
#define BOTH(name, key) BRANCH(name, key, likely) BRANCH(name, key, unlikely)

BOTH(schedstats, sched_schedstats)
BOTH(bpf_stats, bpf_stats_enabled_key)
BOTH(on, locus_begins_on)
BOTH(off, locus_begins_off)

#define TELL(m, name, key) do {						\
	int on = static_key_enabled(&key);				\
									\
	tell(m, #name " likely", locus_##name##_likely(), on);		\
	tell(m, #name " unlikely", locus_##name##_unlikely(), on);	\
	seq_printf(m, #name "=%d\n", on);				\
} while (0)

static int locus_statickey_show(struct seq_file *m, void *v)
{
	TELL(m, schedstats, sched_schedstats);
	TELL(m, bpf_stats, bpf_stats_enabled_key);
	TELL(m, on, locus_begins_on);
	TELL(m, off, locus_begins_off);
	return 0;
}

static int locus_statickey_turn(struct seq_file *m, void *v)
{
	if (static_key_enabled(&locus_begins_on))
		static_branch_disable(&locus_begins_on);
	else
		static_branch_enable(&locus_begins_on);
	if (static_key_enabled(&locus_begins_off))
		static_branch_disable(&locus_begins_off);
	else
		static_branch_enable(&locus_begins_off);
	seq_puts(m, "turned\n");
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_statickey_show),
	REPLACE("version_proc_show", locus_statickey_turn));
MODULE_DESCRIPTION("Test: static keys that are turned");
