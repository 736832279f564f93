// SPDX-License-Identifier: GPL-2.0-only
/*
 * No patch: makes the guest's own kernel lie to who reads its memory, and goes on running. Each
 * parameter is one lie; unloading the module takes them back.
 *
 * The kernel itself must not stumble over a lie, so each is told where it does not look while the
 * test runs: lists are bent between entries that stay, and are walked as a whole by nobody; names,
 * types and the banner are read only by who asks for them.
 */
#include <linux/kallsyms.h>
#include <linux/kprobes.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/vmalloc.h>
#include <asm/pgtable.h>

static char *lie = "";
module_param(lie, charp, 0444);
MODULE_PARM_DESC(lie, "tasks, threads, modules, btf, banner, names or pages");

static unsigned long (*lookup)(const char *name);

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

/* What was changed, to be put back. */
static void *changed;
static u8 old[64];
static size_t changed_len;

/* Read-only data of the kernel is written through a mapping of its own. */
static int overwrite(void *at, const void *bytes, size_t len)
{
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)at, &level);
	struct page *page;
	unsigned long pfn;
	void *window;

	if (!pte)
		return -EFAULT;
	pfn = level == PG_LEVEL_4K ? pte_pfn(*pte) :
		pmd_pfn(*(pmd_t *)pte) + (((unsigned long)at & ~PMD_MASK) >> PAGE_SHIFT);
	page = pfn_to_page(pfn);
	window = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!window)
		return -ENOMEM;
	memcpy(window + offset_in_page(at), bytes, len);
	vunmap(window);
	return 0;
}

static int tell(void *at, const void *bytes, size_t len)
{
	if (!at || len > sizeof(old) || offset_in_page(at) + len > PAGE_SIZE)
		return -EINVAL;
	memcpy(old, at, len);
	changed = at;
	changed_len = len;
	return overwrite(at, bytes, len);
}

/* An entry of a list is followed by another than it was. */
static int bend(struct list_head *entry, struct list_head *next)
{
	return tell(&entry->next, &next, sizeof(next));
}

static const char digits[] = "0\0001\0002\0003\0004\0005\0006\0007\0008\0009";

/* The table of tokens of which names are made: between these two, and no symbol tells where. */
static void *find_tokens(void)
{
	u8 *at = (u8 *)lookup("linux_banner");
	u8 *end = (u8 *)lookup("__start_BTF");

	if (!at || !end)
		return NULL;
	for (; at + sizeof(digits) < end; at++)
		if (!memcmp(at, digits, sizeof(digits)))
			return at;
	return NULL;
}

/* Empty entries of the page table that maps the kernel image, and what was put there. */
static pmd_t *bent_pmd;
static u64 bent_to;

/*
 * All of the image's gibibyte that is empty leads to one page. The kernel never looks there: it
 * emptied these entries itself when it started (cleanup_highmap()).
 */
static int map_everywhere(void)
{
	unsigned long text = lookup("_text");
	unsigned int level;
	pte_t *first = lookup_address(text, &level);
	u64 *table = (u64 *)get_zeroed_page(GFP_KERNEL);
	u64 *page = (u64 *)get_zeroed_page(GFP_KERNEL);
	int i;

	/* A PV guest's page tables belong to Xen. */
	if (!table || !page || !first || level != PG_LEVEL_2M)
		return -ENODEV;
	for (i = 0; i < 512; i++)
		table[i] = __pa(page) | 1 | 1ull << 63;
	bent_pmd = (pmd_t *)((unsigned long)first & PAGE_MASK);
	bent_to = __pa(table) | 1;
	for (i = 0; i < 512; i++)
		if (!pmd_val(bent_pmd[i]))
			WRITE_ONCE(*(u64 *)&bent_pmd[i], bent_to);
	return 0;
}

static int __init locus_liar_init(void)
{
	struct task_struct *first, *second, *third;
	u8 junk[16];
	void *at;
	int err = find_lookup();

	if (err)
		return err;
	first = list_first_entry(&init_task.tasks, struct task_struct, tasks);
	second = list_next_entry(first, tasks);
	third = list_next_entry(second, tasks);
	memset(junk, 0xff, sizeof(junk));

	if (!strcmp(lie, "tasks")) /* The second leads back to the first, the head is not met again. */
		return bend(&second->tasks, &first->tasks);
	if (!strcmp(lie, "threads")) /* The only thread of a kernel thread is followed by itself. */
		return bend(&third->thread_node, &third->thread_node);
	if (!strcmp(lie, "modules"))
		return bend(&THIS_MODULE->list, &THIS_MODULE->list);
	if (!strcmp(lie, "btf")) { /* The types begin at and are long 4 GiB. */
		at = (void *)lookup("__start_BTF");
		return at ? tell(at + 8, junk, 8) : -ENOENT;
	}
	if (!strcmp(lie, "banner"))
		return tell((void *)lookup("linux_banner"), junk, sizeof(junk));
	at = find_tokens();
	if (!at)
		return -ENOENT;
	if (!strcmp(lie, "names"))
		return tell(at, junk, 8);
	if (!strcmp(lie, "pages")) {
		err = map_everywhere();
		return err ? err : tell(at, junk, 8);
	}
	return -EINVAL;
}

static void __exit locus_liar_exit(void)
{
	int i;

	if (changed)
		overwrite(changed, old, changed_len);
	/* The pages they led to are not given back: a TLB may know them. */
	for (i = 0; bent_pmd && i < 512; i++)
		if (pmd_val(bent_pmd[i]) == bent_to)
			WRITE_ONCE(*(u64 *)&bent_pmd[i], 0);
}

module_init(locus_liar_init);
module_exit(locus_liar_exit);
MODULE_DESCRIPTION("Make the kernel lie to who reads its memory");
MODULE_LICENSE("GPL");
