/*
 * What the probe's sources share: the memory through which the lab controls the probe and reads its log, and the
 * functions of the log (probe.c) and of the stage-2 tables (tables.c).
 */
#ifndef PROBE_H
#define PROBE_H

#include <stdint.h>

/* -- shared memory: framework/arm_kvm/recorder/probe.py has the same layout ---------------------------------------- */

enum { MAX_POINTS = 64, MAX_CPUS = 16, MAX_FORGET = 1 << 17 };
/* VTTBR and VTCR: the operand is the register's new value. Tables are compared first: all VMs' for ALL_VMS, else the
 * loaded VM's; none for VTCR, which is not logged. */
enum kind { PLAIN, VTTBR, VTCR, ALL_VMS };
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
	uint64_t epoch;    /* the lab increments it for each recording: forget all tables */
	uint64_t armed, points, capacity;
	uint64_t armv7;    /* 1: 32-bit registers, and VTCR as in Armv7 */
	uint64_t ram_base, ram_size;
	uint64_t head;     /* number of records; those beyond capacity are lost */
	uint64_t mismatch; /* operands that were not found where they should be */
	uint64_t granules; /* roots of a granule other than 4 KiB, whose tables were not compared */
	uint64_t forgets;  /* number of roots in forget[]: their VMs are destroyed */
	uint64_t vttbr[MAX_CPUS], vtcr[MAX_CPUS];
	struct point point[MAX_POINTS];
	uint64_t forget[MAX_FORGET];
	struct record log[];
};

extern struct control *shared;
extern const uint8_t *ram;

/* Append to the log; sets ns and written. */
void log_record(struct record r);

/* Take note of a new recording and of destroyed VMs. */
void heed_the_lab(void);

/* Compare the tables of the VM whose VTTBR is loaded on this CPU, or of all VMs, and log the entries that changed. */
void compare_tables(unsigned cpu);
void compare_all_tables(void);

#endif
