// SPDX-License-Identifier: GPL-2.0-only
/*
 * No patch: a guest that changes what dom0 reads of it while it is read, and what dom0 wrote. What it
 * does is written to parameters/mode: each mode ends the one before and takes back what that did, and
 * "stop" does only that. parameters/state says how often it did so, and whether data of its own, in pages
 * that dom0 might take for the arena, is as it was written.
 *
 * The guest itself must not stumble over it, so all is done where its kernel does not look meanwhile.
 * It is no parameter of insmod, and rmmod is not needed, since both look at the list of modules, which
 * leads into the arena.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/vmalloc.h>
#include <asm/pgtable.h>
#include <xen/xen.h>
#include <xen/xenbus.h>

#define ARENA 0xffffffffff601000ul
#define ARENA_PAGES 96
#define LOW_FIRST 0xa0
#define LOW_END 0x100
#define PATTERN 0x6c6f63757321736cull

static unsigned long (*lookup)(const char *name);
static struct task_struct *worker;
static const char *mode = "stop";
static unsigned long rounds;
static u64 seed = 88172645463325252ull;

static u32 any(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed >> 16;
}

/* kallsyms_lookup_name() is not exported: a probe tells where it is. */
static int find_lookup(void)
{
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };
	int err = register_kprobe(&probe);

	if (err)
		return err;
	lookup = (void *)probe.addr;
	unregister_kprobe(&probe);
	return 0;
}

/* A writable mapping of the page of an address of the kernel's image, at that address. */
static void *writable(void *at)
{
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)at, &level);
	struct page *page;
	unsigned long pfn;
	void *window;

	if (!pte)
		return NULL;
	pfn = level == PG_LEVEL_4K ? pte_pfn(*pte) :
		pmd_pfn(*(pmd_t *)pte) + (((unsigned long)at & ~PMD_MASK) >> PAGE_SHIFT);
	page = pfn_to_page(pfn);
	window = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	return window ? window + offset_in_page(at) : NULL;
}

/* --- Words that are right at one moment and wrong at the next. --- */

struct word {
	u64 *at, right, wrong;
	void *window;
};
static struct word words[3];
static int nwords;
static pte_t *bent[8], bent_right[8];
static pmd_t *bent_pmd, bent_pmd_right;
static int nbent;

static void add_word(void *at, u64 wrong, bool read_only)
{
	struct word *word = &words[nwords];

	if (!at || !IS_ALIGNED((unsigned long)at, 8))
		return;
	word->window = read_only ? writable(at) : NULL;
	word->at = read_only ? word->window : at;
	if (!word->at)
		return;
	word->right = *word->at;
	word->wrong = wrong;
	nwords++;
}

static const char digits[] = "0\0001\0002\0003\0004\0005\0006\0007\0008\0009";

/* The table of tokens of which names are made: its digits stand between these two, at any address. */
static void *find_tokens(void)
{
	u8 *at = (u8 *)lookup("linux_banner");
	u8 *end = (u8 *)lookup("__start_BTF");

	for (; at && end && at + sizeof(digits) < end; at++)
		if (!memcmp(at, digits, sizeof(digits)))
			return PTR_ALIGN(at, 8);
	return NULL;
}

/* Entries of page tables that lead to the middle of the types, which nobody in the guest reads. */
static void find_pages(void)
{
	unsigned long start = lookup("__start_BTF"), stop = lookup("__stop_BTF");
	unsigned int level;
	int i;

	if (!start || stop < start + (4 << PMD_SHIFT) / 3)
		return;
	for (i = 0; i < ARRAY_SIZE(bent); i++) {
		unsigned long at = start + (stop - start) / 2 + i * PAGE_SIZE;
		pte_t *pte = lookup_address(at, &level);

		if (!pte)
			return;
		if (level == PG_LEVEL_2M) {
			at = ALIGN(start, PMD_SIZE);
			if (at + PMD_SIZE <= stop) {
				bent_pmd = (pmd_t *)lookup_address(at, &level);
				bent_pmd_right = *bent_pmd;
			}
			return;
		}
		bent[nbent] = pte;
		bent_right[nbent++] = *pte;
	}
}

static int flip_start(const char *what)
{
	bool all = !strcmp(what, "flip");
	struct task_struct *first, *second;

	nwords = nbent = 0;
	bent_pmd = NULL;
	if (all || !strcmp(what, "names"))
		add_word(find_tokens(), ~0ull, true);
	if (all || !strcmp(what, "btf")) /* The types begin at and are long 4 GiB. */
		add_word((void *)lookup("__start_BTF") + 8, ~0ull, true);
	if (all || !strcmp(what, "tasks")) {
		/* The second leads back to the first, so the head is not met again. */
		first = list_first_entry(&init_task.tasks, struct task_struct, tasks);
		second = list_next_entry(first, tasks);
		add_word(&second->tasks.next, (u64)&first->tasks, false);
	}
	if (all || !strcmp(what, "pages"))
		find_pages();
	return nwords || nbent || bent_pmd ? 0 : -ENOENT;
}

static void bend(bool right)
{
	int i;

	for (i = 0; i < nwords; i++)
		WRITE_ONCE(*words[i].at, right ? words[i].right : words[i].wrong);
	/* A PV guest's entries are Xen's, which takes none to a page that is not the guest's. */
	for (i = 0; i < nbent; i++)
		set_pte(bent[i], right ? bent_right[i] : __pte(0));
	if (bent_pmd) /* Behind all memory. */
		WRITE_ONCE(*(u64 *)bent_pmd,
			   right ? pmd_val(bent_pmd_right) : pmd_val(bent_pmd_right) | 0xffffull << 32);
}

static void flip_round(void)
{
	bend(any() & 1);
	usleep_range(20, 20 + any() % 400);
}

static void flip_stop(void)
{
	int i;

	bend(true);
	for (i = 0; i < nwords; i++)
		if (words[i].window)
			vunmap((void *)((unsigned long)words[i].window & PAGE_MASK));
}

/* --- The arena's own pages. --- */

static pte_t *entry_of(int page)
{
	unsigned int level;
	pte_t *pte = lookup_address(ARENA + page * PAGE_SIZE, &level);

	return pte && level == PG_LEVEL_4K ? pte : NULL;
}

/* Page number `page` of the arena, writable. */
static u8 *arena_page(int page)
{
	pte_t *pte = entry_of(page);

	if (!pte || !pte_present(*pte))
		return NULL;
	if (xen_pv_domain())
		return __va(pte_pfn(*pte) << PAGE_SHIFT);
	return (u8 __force *)ioremap_cache(pte_pfn(*pte) << PAGE_SHIFT, PAGE_SIZE);
}

static void put_page_of(u8 *at)
{
	if (at && !xen_pv_domain())
		iounmap((void __iomem *)at);
}

/* One byte becomes another for a while; sometimes it stays so. */
struct change {
	u8 *at, was;
};

static void change_byte(struct change *change, u8 *at)
{
	change->at = at;
	change->was = READ_ONCE(*at);
	WRITE_ONCE(*at, ~change->was);
}

/* Where the text that is the record of a payload begins: page and offset. */
static int record_page, record_at;

static void find_record(void)
{
	static const char head[] = "{\"schema\"";

	for (record_page = 1; record_page < 32; record_page++) {
		u8 *at = arena_page(record_page);

		for (record_at = 0; at && record_at < PAGE_SIZE - sizeof(head); record_at++)
			if (!memcmp(at + record_at, head, sizeof(head) - 1)) {
				put_page_of(at);
				return;
			}
		put_page_of(at);
	}
	record_page = 0;
}

/* Bytes of one copy of the directory, of both, or of a record. */
static void arena_round(void)
{
	struct change changes[2] = {};
	u32 what = any() % 4;
	u8 *at;
	int i;

	if (!record_page)
		find_record();
	if (!record_page && what == 3)
		what = 0;
	at = arena_page(what == 3 ? record_page : 0);
	if (at) {
		if (what == 3)
			change_byte(&changes[0], at + record_at + any() % min_t(int, 64, PAGE_SIZE - record_at));
		else if (what != 1)
			change_byte(&changes[0], at + any() % 128);
		if (what == 1 || what == 2)
			change_byte(&changes[1], at + PAGE_SIZE / 2 + any() % 128);
		usleep_range(200, 200 + any() % 2000);
		for (i = 0; i < 2; i++)
			if (changes[i].at && any() % 256)
				WRITE_ONCE(*changes[i].at, changes[i].was);
	}
	put_page_of(at);
	usleep_range(20, 20 + any() % 400);
}

/*
 * Entries of the arena's table that lead elsewhere: as dom0 reads them. CPUs may go on as they know them,
 * and nothing there differs for them.
 */
static pte_t *moved, moved_right;
static pmd_t *moved_pmd, moved_pmd_right;
static struct page *own;

static void fill_own(u64 *at)
{
	int i;

	for (i = 0; i < PAGE_SIZE / 8; i++)
		at[i] = PATTERN + i;
}

static bool is_own(const u64 *at)
{
	int i;

	for (i = 0; i < PAGE_SIZE / 8; i++)
		if (READ_ONCE(at[i]) != PATTERN + i)
			return false;
	return true;
}

static int remap_start(const char *how)
{
	int page = !strcmp(how, "code") ? 1 : 0;
	u8 *old;

	moved = entry_of(page);
	moved_pmd = NULL;
	if (!moved)
		return -ENOENT;
	moved_right = *moved;
	if (!strcmp(how, "clear")) {
		set_pte(moved, __pte(0));
		return 0;
	}
	own = alloc_page(GFP_KERNEL | __GFP_ZERO);
	if (!own)
		return -ENOMEM;
	if (!strcmp(how, "own")) /* It uses the address itself. */
		fill_own(page_address(own));
	if (!strcmp(how, "swap") || !strcmp(how, "code")) { /* Another page with the same in it. */
		old = arena_page(page);
		if (!old)
			return -ENOENT;
		memcpy(page_address(own), old, PAGE_SIZE);
		put_page_of(old);
	}
	if (!strcmp(how, "table")) { /* Another table with the same in it. */
		unsigned long table = (unsigned long)moved & PAGE_MASK;
		unsigned long pmd = lookup("level2_fixmap_pgt");

		if (xen_pv_domain() || !pmd)
			return -ENODEV;
		memcpy(page_address(own), (void *)table, PAGE_SIZE);
		moved = NULL;
		moved_pmd = (pmd_t *)pmd + pmd_index(ARENA);
		moved_pmd_right = *moved_pmd;
		WRITE_ONCE(*(u64 *)moved_pmd, page_to_phys(own) | (pmd_val(*moved_pmd) & ~PTE_PFN_MASK));
		return 0;
	}
	set_pte(moved, mk_pte(own, page ? PAGE_KERNEL_ROX : PAGE_KERNEL));
	return 0;
}

static void remap_stop(void)
{
	if (moved_pmd)
		WRITE_ONCE(*(u64 *)moved_pmd, pmd_val(moved_pmd_right));
	else if (moved)
		set_pte(moved, moved_right);
	/* The page is not given back: a TLB may know it. */
	moved = NULL;
	moved_pmd = NULL;
}

/* --- The low pages of a PV guest. --- */

static int low_start(const char *how)
{
	unsigned long pfn;

	if (!xen_pv_domain())
		return -ENODEV;
	for (pfn = LOW_FIRST; pfn < LOW_END; pfn++)
		if (!strcmp(how, "data"))
			fill_own(__va(pfn << PAGE_SHIFT));
		else
			ClearPageReserved(pfn_to_page(pfn));
	return 0;
}

static void low_stop(void)
{
	unsigned long pfn;

	for (pfn = LOW_FIRST; pfn < LOW_END; pfn++) {
		if (!strcmp(mode, "data"))
			memset(__va(pfn << PAGE_SHIFT), 0, PAGE_SIZE);
		SetPageReserved(pfn_to_page(pfn));
	}
}

static bool low_intact(void)
{
	static const u64 zero[PAGE_SIZE / 8];
	unsigned long pfn;

	for (pfn = LOW_FIRST; pfn < LOW_END; pfn++) {
		const u64 *at = __va(pfn << PAGE_SHIFT);

		if (!strcmp(mode, "data") ? !is_own(at) : !!memcmp(at, zero, PAGE_SIZE))
			return false;
	}
	return true;
}

/* --- XenStore. --- */

static void store_round(void)
{
	static const char *const dirs[] = { "data", "error", "attr", "drivers", "control" };
	static const char *const nodes[] = { "xen-locus", "submit", "name", "uuid", "state", "op" };
	static char text[1024];
	char node[64];
	int i, len = any() % (sizeof(text) - 1);

	for (i = 0; i < len; i++)
		text[i] = 1 + any() % 255;
	text[len] = 0;
	snprintf(node, sizeof(node), "%s/%u", nodes[any() % ARRAY_SIZE(nodes)], any() % 100);
	/* Some it may not write: that is what is tried. */
	if (!xenbus_write(XBT_NIL, dirs[any() % ARRAY_SIZE(dirs)],
			  any() & 1 ? node : nodes[any() % ARRAY_SIZE(nodes)], text))
		rounds++;
	if (!(any() % 16))
		xenbus_write(XBT_NIL, "/tool/xen-locus/request", node, text);
	cond_resched();
}

/* --- Which of them. --- */

struct way {
	const char *name;
	int (*start)(const char *name);
	void (*round)(void);
	void (*stop)(void);
};
static const struct way ways[] = {
	{ "stop" },
	{ "flip", flip_start, flip_round, flip_stop },
	{ "names", flip_start, flip_round, flip_stop },
	{ "btf", flip_start, flip_round, flip_stop },
	{ "tasks", flip_start, flip_round, flip_stop },
	{ "pages", flip_start, flip_round, flip_stop },
	{ "arena", NULL, arena_round },
	{ "clear", remap_start, NULL, remap_stop },
	{ "swap", remap_start, NULL, remap_stop },
	{ "code", remap_start, NULL, remap_stop },
	{ "own", remap_start, NULL, remap_stop },
	{ "table", remap_start, NULL, remap_stop },
	{ "data", low_start, NULL, low_stop },
	{ "free", low_start, NULL, low_stop },
	{ "store", NULL, store_round },
};
static const struct way *now = &ways[0];

static int work(void *unused)
{
	while (!kthread_should_stop()) {
		now->round();
		if (now->round != store_round)
			rounds++;
	}
	return 0;
}

static int set_mode(const char *value, const struct kernel_param *unused)
{
	int i, err;

	for (i = 0; i < ARRAY_SIZE(ways); i++)
		if (sysfs_streq(value, ways[i].name))
			break;
	if (i == ARRAY_SIZE(ways) || !lookup)
		return -EINVAL;
	if (worker)
		kthread_stop(worker);
	worker = NULL;
	if (now->stop)
		now->stop();
	now = &ways[0];
	mode = now->name;
	rounds = 0;
	err = ways[i].start ? ways[i].start(ways[i].name) : 0;
	if (err)
		return err;
	now = &ways[i];
	mode = now->name;
	if (now->round) {
		worker = kthread_run(work, NULL, "locus_hostile");
		if (IS_ERR(worker)) {
			worker = NULL;
			return -ENOMEM;
		}
	}
	return 0;
}

static int get_mode(char *buf, const struct kernel_param *unused)
{
	return sprintf(buf, "%s\n", mode);
}

static int get_state(char *buf, const struct kernel_param *unused)
{
	bool intact = true;

	if (now->start == low_start)
		intact = low_intact();
	else if (!strcmp(mode, "own"))
		intact = is_own(page_address(own));
	return sprintf(buf, "%lu %s\n", rounds, intact ? "intact" : "changed");
}

static const struct kernel_param_ops mode_ops = { .set = set_mode, .get = get_mode };
static const struct kernel_param_ops state_ops = { .get = get_state };
module_param_cb(mode, &mode_ops, NULL, 0600);
module_param_cb(state, &state_ops, NULL, 0400);
MODULE_PARM_DESC(mode, "What it does");
MODULE_PARM_DESC(state, "Rounds, and whether its own data is intact");

static int __init locus_hostile_init(void)
{
	return find_lookup();
}

static void __exit locus_hostile_exit(void)
{
	set_mode("stop", NULL);
}

module_init(locus_hostile_init);
module_exit(locus_hostile_exit);
MODULE_DESCRIPTION("Change what dom0 reads, and what it wrote");
MODULE_LICENSE("GPL");
