// SPDX-License-Identifier: GPL-2.0-only
/*
 * Places that the kernel's loader fits to the machine: paravirtual operations, lock prefixes,
 * indirect branches, returns.
 */
#include <linux/atomic.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/spinlock.h>
#include <asm/pgtable.h>

#include "../payload.h"

static DEFINE_SPINLOCK(locus_lock);
static atomic_t locus_count = ATOMIC_INIT(40);
static unsigned long locus_bits;

static noinline u64 locus_add(u64 a, u64 b)
{
	return a + b;
}

static noinline u64 locus_multiply(u64 a, u64 b)
{
	return a * b;
}

static u64 (*locus_operations[])(u64, u64) = { locus_add, locus_multiply };

/* A jump through a pointer in the last place. */
static noinline u64 locus_operate(int which, u64 a, u64 b)
{
	return READ_ONCE(locus_operations[which])(a, b);
}

static noinline u64 locus_operate_both(u64 a, u64 b)
{
	u64 sum = READ_ONCE(locus_operations[0])(a, b);

	return sum + READ_ONCE(locus_operations[1])(a, b);
}

static int locus_sites_show(struct seq_file *m, void *v)
{
	unsigned long flags, page = __get_free_page(GFP_KERNEL);
	int before, in, after;
	pte_t pte;

	before = irqs_disabled();
	local_irq_save(flags);
	in = irqs_disabled();
	local_irq_restore(flags);
	after = irqs_disabled();
	tell(m, "interrupts on", before, 0);
	tell(m, "interrupts off", in, 1);
	tell(m, "interrupts on again", after, 0);
	local_irq_disable();
	in = irqs_disabled();
	local_irq_enable();
	tell(m, "local_irq_disable", in, 1);
	tell(m, "local_irq_enable", irqs_disabled(), 0);

	if (page) {
		pte = pfn_pte(__pa(page) >> PAGE_SHIFT, PAGE_KERNEL_RO);
		tell(m, "page table entry", pte_val(pte) & PTE_PFN_MASK, __pa(page));
		tell(m, "pte_write", !!pte_write(pte), 0);
		free_page(page);
	}

	spin_lock_irqsave(&locus_lock, flags);
	tell(m, "spin_is_locked", spin_is_locked(&locus_lock), 1);
	spin_unlock_irqrestore(&locus_lock, flags);
	tell(m, "spin_unlock", spin_is_locked(&locus_lock), 0);
	atomic_set(&locus_count, 40);
	tell(m, "atomic_add_return", atomic_add_return(2, &locus_count), 42);
	tell(m, "atomic_cmpxchg", atomic_cmpxchg(&locus_count, 42, 43), 42);
	atomic_inc(&locus_count);
	tell(m, "atomic_inc", atomic_read(&locus_count), 44);
	locus_bits = 0;
	tell(m, "test_and_set_bit", test_and_set_bit(5, &locus_bits), 0);
	tell(m, "test_and_clear_bit", test_and_clear_bit(5, &locus_bits), 1);

	tell(m, "indirect jump", locus_operate(0, 6, 7), 13);
	tell(m, "another", locus_operate(1, 6, 7), 42);
	tell(m, "indirect calls", locus_operate_both(6, 7), 55);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_sites_show));
MODULE_DESCRIPTION("Test: code that is fitted to the machine");
