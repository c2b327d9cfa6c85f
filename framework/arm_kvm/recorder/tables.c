/*
 * The stage-2 tables of the VMs that have been entered: a copy of each table page, which is compared with memory at
 * every event for which the tables matter.
 */
#include <stddef.h>
#include <stdlib.h>

#include "probe.h"

enum { STRIDE = 9, PAGE_SHIFT = 12, LAST_LEVEL = 3 };
#define ADDRESS 0x0000fffffffff000ull
#define ROOT 0x0000fffffffffffeull /* VTTBR without VMID and CnP */

struct table {
	uint64_t pa;
	size_t entries;
	uint64_t *was;
	struct table **below; /* by entry; NULL at the last level */
};

struct vm {
	struct vm *next;
	struct table *root;
	int level;
};

enum { BUCKETS = 4096 };
static struct vm *vms[BUCKETS];
static uint64_t epoch, forgotten;

static struct table *new_table(uint64_t pa, size_t entries, int level)
{
	struct table *t = calloc(1, sizeof(*t));

	t->pa = pa;
	t->entries = entries;
	t->was = calloc(entries, sizeof(*t->was));
	t->below = level < LAST_LEVEL ? calloc(entries, sizeof(*t->below)) : NULL;
	return t;
}

static void log_entry(const struct table *root, uint64_t ipa, int level, uint64_t old, uint64_t new)
{
	log_record((struct record){ .entry = 1, .cpu = 0xff, .level = level, .a = root->pa, .b = ipa, .c = old, .d = new });
}

static int points_to_table(uint64_t desc, int level)
{
	return level < LAST_LEVEL && (desc & 3) == 3;
}

static int shift_of(int level)
{
	return PAGE_SHIFT + STRIDE * (LAST_LEVEL - level);
}

/* Free the copy of a table that is not reached any more. Logs its entries as changed to 0, unless `quiet`. */
static void drop(const struct table *root, struct table *t, uint64_t ipa, int level, int quiet)
{
	for (size_t i = 0; i < t->entries; i++) {
		if (t->below && t->below[i])
			drop(root, t->below[i], ipa + ((uint64_t)i << shift_of(level)), level + 1, quiet);
		if (t->was[i] && !quiet)
			log_entry(root, ipa + ((uint64_t)i << shift_of(level)), level, t->was[i], 0);
	}
	free(t->was);
	free(t->below);
	free(t);
}

static void compare(const struct table *root, struct table *t, uint64_t ipa, int level)
{
	const uint64_t *is = (const uint64_t *)(ram + (t->pa - shared->ram_base));

	if (t->pa < shared->ram_base || t->pa + t->entries * 8 > shared->ram_base + shared->ram_size)
		return;
	for (size_t i = 0; i < t->entries; i++) {
		uint64_t old = t->was[i], new = __atomic_load_n(&is[i], __ATOMIC_RELAXED);
		uint64_t at = ipa + ((uint64_t)i << shift_of(level));

		if (old != new) {
			if (t->below && t->below[i] && (!points_to_table(new, level) || ((old ^ new) & ADDRESS))) {
				drop(root, t->below[i], at, level + 1, 0);
				t->below[i] = NULL;
			}
			log_entry(root, at, level, old, new);
			t->was[i] = new;
			if (points_to_table(new, level) && !t->below[i])
				t->below[i] = new_table(new & ADDRESS, 1 << STRIDE, level + 1);
		}
		if (t->below && t->below[i])
			compare(root, t->below[i], at, level + 1);
	}
}

static struct vm **find(uint64_t root)
{
	struct vm **v = &vms[(root >> PAGE_SHIFT) % BUCKETS];

	while (*v && (*v)->root->pa != root)
		v = &(*v)->next;
	return v;
}

/* VTCR gives the level and the number of entries of the root: SL0, and T0SZ (in Armv7 a signed number of 4 bits). */
static struct vm *new_vm(uint64_t root, uint64_t vtcr)
{
	int sl0 = vtcr >> 6 & 3;
	int input_bits = shared->armv7 ? 32 - ((int)(vtcr & 15) ^ 8) + 8 : 64 - (int)(vtcr & 63);
	struct vm *v = calloc(1, sizeof(*v));

	v->level = sl0 == 3 ? 3 : 2 - sl0;
	v->root = new_table(root, 1ull << (input_bits - shift_of(v->level)), v->level);
	return v;
}

void compare_tables(unsigned cpu)
{
	uint64_t root = shared->vttbr[cpu] & ROOT, vtcr = shared->vtcr[cpu];
	struct vm **v = find(root);

	if (!root)
		return;
	if (!*v && !shared->armv7 && vtcr >> 14 & 3) {
		shared->granules++;
		return;
	}
	if (!*v)
		*v = new_vm(root, vtcr);
	compare((*v)->root, (*v)->root, 0, (*v)->level);
}

void compare_all_tables(void)
{
	for (int b = 0; b < BUCKETS; b++)
		for (struct vm *v = vms[b]; v; v = v->next)
			compare(v->root, v->root, 0, v->level);
}

static void forget(struct vm **v)
{
	struct vm *gone = *v;

	*v = gone->next;
	drop(gone->root, gone->root, 0, gone->level, 1);
	free(gone);
}

void heed_the_lab(void)
{
	uint64_t forgets = __atomic_load_n(&shared->forgets, __ATOMIC_ACQUIRE);

	if (epoch != shared->epoch) {
		for (int b = 0; b < BUCKETS; b++)
			while (vms[b])
				forget(&vms[b]);
		epoch = shared->epoch;
		forgotten = 0;
	}
	for (; forgotten < forgets && forgotten < MAX_FORGET; forgotten++) {
		struct vm **v = find(shared->forget[forgotten]);

		if (*v)
			forget(v);
	}
}
