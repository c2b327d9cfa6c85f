/*
 * The recorder's probe: a TCG plugin that logs when chosen instructions are executed, and what changed in the stage-2
 * tables since. It knows no instruction set: framework/arm_kvm/recorder/probe.py says, through shared memory, which addresses
 * are of interest and which registers hold their operands.
 *
 * From QEMU 9.0 on the operand is read through the plugin API, before the instruction is executed. Earlier QEMU gives a
 * plugin no registers. But the callback at the start of a translation block finds QEMU's CPU state in the register that
 * TCG keeps it in, and all guest registers are in it then. An instruction with an operand ends its block (a system
 * register is written), so its operand is read at the start of the next block, and so is the guest's pc, which must be
 * the one expected: else the layout is not what we think, and `mismatch` says so.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "plugin_api.h"

EXPORT int qemu_plugin_version = API;

/* -- shared memory: the same in probe.py ------------------------------------------------------------------------- */

enum { MAX_POINTS = 64, MAX_CPUS = 16, MAX_FORGET = 1 << 17 };
enum kind { PLAIN, VTTBR, VTCR, ALL_VMS }; /* what an event means for the tables that are compared */
#define NONE (~0u)

struct point {
	uint64_t vaddr;
	uint32_t kind;
	uint32_t begins_block; /* a block always begins at this instruction */
	uint32_t reg[2];       /* numbers of the registers that hold the operand's halves, low first; NONE: zero */
};

struct record {
	uint64_t ns;
	uint8_t entry, cpu, point, level; /* entry: 1 for a changed stage-2 entry, 0 for an event */
	uint32_t written;                 /* set last: the recording's epoch */
	uint64_t a, b, c, d;              /* event: operand, -, -, -; entry: root, ipa, old, new */
};

struct control {
	uint64_t epoch;    /* raised by the lab for each recording: forget what was known */
	uint64_t armed, points, capacity;
	uint64_t armv7;    /* 1: 32-bit registers, and VTCR as in Armv7 */
	uint64_t ram_base, ram_size;
	uint64_t head;     /* records used; may exceed capacity, the rest is lost */
	uint64_t mismatch; /* operands that were not found where they should be */
	uint64_t granules; /* roots of a granule other than 4 KiB, whose tables were not followed */
	uint64_t forgets;  /* roots in forget[]: their VMs are destroyed */
	uint64_t vttbr[MAX_CPUS], vtcr[MAX_CPUS];
	struct point point[MAX_POINTS];
	uint64_t forget[MAX_FORGET];
	struct record log[];
};

static struct control *shared;
static const uint8_t *ram;

/* -- the log ------------------------------------------------------------------------------------------------------- */

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void log_record(struct record r)
{
	uint64_t i = __atomic_fetch_add(&shared->head, 1, __ATOMIC_SEQ_CST);

	if (i >= shared->capacity)
		return;
	r.ns = now();
	r.written = 0;
	shared->log[i] = r;
	__atomic_store_n(&shared->log[i].written, (uint32_t)shared->epoch, __ATOMIC_RELEASE);
}

/* -- the tables: a copy of each page, compared when an event makes it matter --------------------------------------- */

enum { STRIDE = 9, PAGE_SHIFT = 12, PAGE = 1 << PAGE_SHIFT, LAST_LEVEL = 3 };
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

/* The table is not reached any more: whatever it mapped is gone. `quiet`: nobody asks. */
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

/* Where the tables begin, and how many entries the root has: VTCR.SL0, T0SZ (in Armv7 a signed number of 4 bits). */
static struct vm *new_vm(uint64_t root, uint64_t vtcr)
{
	int sl0 = vtcr >> 6 & 3;
	int input_bits = shared->armv7 ? 32 - ((int)(vtcr & 15) ^ 8) + 8 : 64 - (int)(vtcr & 63);
	struct vm *v = calloc(1, sizeof(*v));

	v->level = sl0 == 3 ? 3 : 2 - sl0;
	v->root = new_table(root, 1ull << (input_bits - shift_of(v->level)), v->level);
	return v;
}

static void look_at(unsigned cpu)
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

static void look_at_all(void)
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

/* What the lab has said since the last event. */
static void heed_the_lab(void)
{
	uint64_t told = __atomic_load_n(&shared->forgets, __ATOMIC_ACQUIRE);

	if (epoch != shared->epoch) {
		for (int b = 0; b < BUCKETS; b++)
			while (vms[b])
				forget(&vms[b]);
		epoch = shared->epoch;
		forgotten = 0;
	}
	for (; forgotten < told && forgotten < MAX_FORGET; forgotten++) {
		struct vm **v = find(shared->forget[forgotten]);

		if (*v)
			forget(v);
	}
}

/* -- events ----------------------------------------------------------------------------------------------------------- */

static volatile char busy; /* one event at a time, in the order of the log */

static void event(unsigned cpu, const struct point *p, uint64_t operand)
{
	while (__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE))
		;
	heed_the_lab();
	if (p->kind == VTTBR)
		shared->vttbr[cpu] = operand;
	if (p->kind == VTCR)
		shared->vtcr[cpu] = operand;
	if (p->kind == ALL_VMS)
		look_at_all();
	else if (p->kind != VTCR)
		look_at(cpu);
	if (p->kind != VTCR)
		log_record((struct record){ .cpu = cpu, .point = p - shared->point, .a = operand });
	__atomic_clear(&busy, __ATOMIC_RELEASE);
}

static int has_operand(const struct point *p)
{
	return p->reg[0] != NONE;
}

/* -- operands, through the plugin API ---------------------------------------------------------------------------------- */

enum { REGISTERS = 31 };
static struct qemu_plugin_register *handles[MAX_CPUS][REGISTERS];
static struct bytes *value_read[MAX_CPUS];

static int api_has_registers(void)
{
	return qemu_plugin_get_registers && qemu_plugin_read_register;
}

/* The number of a general register, by its name in gdb's description of the CPU; -1 for any other register. */
static int number_of(const struct register_descriptor *d)
{
	if (!d->feature || !d->name)
		return -1;
	if (!strcmp(d->feature, "org.gnu.gdb.aarch64.core") && d->name[0] == 'x')
		return atoi(d->name + 1);
	if (strcmp(d->feature, "org.gnu.gdb.arm.core"))
		return -1;
	if (d->name[0] == 'r')
		return atoi(d->name + 1);
	return !strcmp(d->name, "sp") ? 13 : !strcmp(d->name, "lr") ? 14 : -1;
}

static void learn_registers(unsigned cpu)
{
	struct array *all;

	if (cpu >= MAX_CPUS || !api_has_registers())
		return;
	all = qemu_plugin_get_registers();
	value_read[cpu] = g_byte_array_new();
	for (unsigned i = 0; i < all->len; i++) {
		const struct register_descriptor *d = (void *)(all->data + i * g_array_get_element_size(all));
		int n = number_of(d);

		if (n >= 0 && n < REGISTERS)
			handles[cpu][n] = d->handle;
	}
}

static uint64_t operand_now(unsigned cpu, const struct point *p)
{
	uint64_t value = 0;

	for (int half = 0; half < 2; half++) {
		struct bytes *b = value_read[cpu];
		uint64_t part = 0;

		if (p->reg[half] == NONE)
			continue;
		if (!b || p->reg[half] >= REGISTERS || !handles[cpu][p->reg[half]]) {
			shared->mismatch++;
			return 0;
		}
		g_byte_array_set_size(b, 0);
		qemu_plugin_read_register(handles[cpu][p->reg[half]], b);
		memcpy(&part, b->data, b->len < sizeof(part) ? b->len : sizeof(part));
		value |= part << (32 * half);
	}
	return value;
}

/* -- operands, from QEMU's CPU state (target/arm/cpu.h, CPUARMState: regs[16] u32, xregs[32] u64, pc u64) --------------- */

static const struct point *pending[MAX_CPUS]; /* executed on this CPU, operand not yet read */

static uint64_t state(const uint8_t *env, unsigned reg)
{
	uint64_t value = 0;

	if (shared->armv7)
		memcpy(&value, env + 4 * reg, 4);
	else
		memcpy(&value, env + 64 + 8 * reg, 8);
	return value;
}

static uint64_t state_pc(const uint8_t *env)
{
	return state(env, shared->armv7 ? 15 : 32);
}

/* A block begins: `env` is QEMU's state of this CPU, in which all guest registers are up to date. */
__attribute__((used, visibility("hidden"))) void block_started(unsigned cpu, void *udata, const uint8_t *env)
{
	const struct point *p = udata;
	uint64_t vaddr = p->vaddr, operand = 0;

	if (!shared->armed || cpu >= MAX_CPUS)
		return;
	if (!p->begins_block) {
		if (pending[cpu] != p)
			return; /* the block was reached another way */
		pending[cpu] = NULL;
		vaddr += 4;
	}
	if (state_pc(env) != vaddr) {
		shared->mismatch++;
		return;
	}
	for (int half = 0; half < 2; half++)
		if (p->reg[half] != NONE)
			operand |= state(env, p->reg[half]) << (32 * half);
	event(cpu, p, operand);
}

/* TCG keeps the CPU state in this register of the machine QEMU runs on (TCG_AREG0, tcg/HOST/tcg-target.h). */
__attribute__((naked)) static void at_block(unsigned cpu, void *udata)
{
#if defined(__x86_64__)
	__asm__("movq %rbp, %rdx; jmp block_started");
#elif defined(__aarch64__)
	__asm__("mov x2, x19; b block_started");
#else
	__asm__("");
#define CPU_STATE_IS_NOWHERE
#endif
}

/* -- what QEMU calls ----------------------------------------------------------------------------------------------------- */

static void executed(unsigned cpu, void *udata)
{
	const struct point *p = udata;

	if (!shared->armed || cpu >= MAX_CPUS)
		return;
	if (!has_operand(p))
		event(cpu, p, 0);
	else if (api_has_registers())
		event(cpu, p, operand_now(cpu, p));
	else
		pending[cpu] = p;
}

/* Ask to be called when this instruction is executed, or when the block is whose start tells its operand. */
static void watch(struct point *p, struct qemu_plugin_tb *tb, struct qemu_plugin_insn *insn, size_t index)
{
	uint64_t vaddr = qemu_plugin_insn_vaddr(insn);
	int by_block = has_operand(p) && !api_has_registers();

	if (p->vaddr == vaddr && !(by_block && p->begins_block))
		qemu_plugin_register_vcpu_insn_exec_cb(insn, executed, has_operand(p) ? CB_R_REGS : CB_NO_REGS, p);
	if (by_block && index == 0 && vaddr == p->vaddr + (p->begins_block ? 0 : 4))
		qemu_plugin_register_vcpu_tb_exec_cb(tb, at_block, CB_NO_REGS, p);
}

static void translated(struct qemu_plugin_tb *tb)
{
	size_t insns = shared->armed ? qemu_plugin_tb_n_insns(tb) : 0;

	for (size_t i = 0; i < insns; i++)
		for (uint64_t n = 0; n < shared->points; n++)
			watch(&shared->point[n], tb, qemu_plugin_tb_get_insn(tb, i), i);
}

#if API >= 7
static void on_translation(struct qemu_plugin_tb *tb, void *udata)
{
	translated(tb);
}

static void on_vcpu(unsigned cpu, void *udata)
{
	learn_registers(cpu);
}
#else
static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	translated(tb);
}

static void on_vcpu(qemu_plugin_id_t id, unsigned cpu)
{
	learn_registers(cpu);
}
#endif

/* -- start -------------------------------------------------------------------------------------------------------------- */

static void *map_file(const char *path, int prot)
{
	int fd = open(path, prot & PROT_WRITE ? O_RDWR : O_RDONLY);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		return MAP_FAILED;
	return mmap(NULL, st.st_size, prot, MAP_SHARED, fd, 0);
}

/* Arguments: control=PATH and ram=PATH, files to map. */
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "control=", 8))
			shared = map_file(argv[i] + 8, PROT_READ | PROT_WRITE);
		else if (!strncmp(argv[i], "ram=", 4))
			ram = map_file(argv[i] + 4, PROT_READ);
	}
	if (!shared || !ram || shared == MAP_FAILED || (void *)ram == MAP_FAILED) {
		fprintf(stderr, "arm-kvm probe: cannot map its memory\n");
		return -1;
	}
#ifdef CPU_STATE_IS_NOWHERE
	if (!api_has_registers()) {
		fprintf(stderr, "arm-kvm probe: before 9.0 QEMU tells no registers on this machine\n");
		return -1;
	}
#endif
	REGISTER(vcpu_init_cb, id, on_vcpu);
	REGISTER(vcpu_tb_trans_cb, id, on_translation);
	return 0;
}
