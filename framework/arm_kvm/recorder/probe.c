/*
 * The recorder's probe: a TCG plugin that logs the execution of chosen instructions, and the stage-2 entries that
 * changed before it (tables.c). It knows no instruction set: framework/arm_kvm/recorder/probe.py passes it, through
 * shared memory, the addresses of the instructions and the registers that hold their operands.
 *
 * From QEMU 9.0 on the operand is read through the plugin API, before the instruction is executed. Earlier versions do
 * not give plugins access to registers. There the callback at the start of a translation block finds QEMU's CPU state,
 * to which all guest registers have been written back, through the host register in which TCG keeps its address. An
 * instruction with an operand ends its block, because it writes a system register, so its operand is read at the start
 * of the next block. The guest's pc is read as well and must be the expected one; otherwise the layout of the CPU state
 * is not the assumed one, which is counted in `mismatch`.
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
#include "probe.h"

EXPORT int qemu_plugin_version = API;

struct control *shared;
const uint8_t *ram;

/* -- the log ------------------------------------------------------------------------------------------------------- */

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

void log_record(struct record r)
{
	uint64_t i = __atomic_fetch_add(&shared->head, 1, __ATOMIC_SEQ_CST);

	if (i >= shared->capacity)
		return;
	r.ns = now();
	r.written = 0;
	shared->log[i] = r;
	__atomic_store_n(&shared->log[i].written, (uint32_t)shared->epoch, __ATOMIC_RELEASE);
}

/* -- events -------------------------------------------------------------------------------------------------------- */

static volatile char busy; /* a lock: events are logged one at a time, with the entries that changed before them */

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
		compare_all_tables();
	else if (p->kind != VTCR)
		compare_tables(cpu);
	if (p->kind != VTCR)
		log_record((struct record){ .cpu = cpu, .point = p - shared->point, .a = operand });
	__atomic_clear(&busy, __ATOMIC_RELEASE);
}

static int has_operand(const struct point *p)
{
	return p->reg[0] != NONE;
}

/* -- operands, through the plugin API ------------------------------------------------------------------------------ */

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

/* -- operands, from QEMU's CPU state (target/arm/cpu.h, CPUARMState: regs[16] u32, xregs[32] u64, pc u64) ---------- */

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

/* Called at the start of a block. `env` is QEMU's state of this CPU, in which all guest registers are up to date. */
__attribute__((used, visibility("hidden"))) void block_started(unsigned cpu, void *udata, const uint8_t *env)
{
	const struct point *p = udata;
	uint64_t vaddr = p->vaddr, operand = 0;

	if (!shared->armed || cpu >= MAX_CPUS)
		return;
	if (!p->begins_block) {
		if (pending[cpu] != p)
			return; /* the block was not entered from the instruction before it */
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

/* TCG keeps the address of the CPU state in this register of QEMU's own CPU (TCG_AREG0, tcg/HOST/tcg-target.h). */
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

/* -- callbacks from QEMU ------------------------------------------------------------------------------------------- */

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

/* Have `executed` called for this instruction, and `at_block` for the block at whose start its operand is read. */
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

/* -- start --------------------------------------------------------------------------------------------------------- */

static void *map_file(const char *path, int prot)
{
	int fd = open(path, prot & PROT_WRITE ? O_RDWR : O_RDONLY);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		return MAP_FAILED;
	return mmap(NULL, st.st_size, prot, MAP_SHARED, fd, 0);
}

/* The arguments control=PATH and ram=PATH are files to map: struct control, and the guest's RAM. */
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
		fprintf(stderr, "arm-kvm probe: QEMU before 9.0 gives plugins no registers, except on x86-64 and arm64\n");
		return -1;
	}
#endif
	REGISTER(vcpu_init_cb, id, on_vcpu);
	REGISTER(vcpu_tb_trans_cb, id, on_translation);
	return 0;
}
