/*
 * The part of QEMU's plugin API that the probe uses (include/qemu/qemu-plugin.h, in 11.x
 * include/plugins/qemu-plugin.h). It is declared here because Debian packages no header, and because one source is
 * compiled for every API version.
 *
 * API is the version to compile for; framework/arm_kvm/recorder/library.py asks QEMU for it. Two of the changes up to
 * version 7 matter. From 7 on, callbacks get user data instead of the plugin's id. Registers can be read since QEMU
 * 9.0, which did not increment the version, so those functions are weak here.
 */
#ifndef PLUGIN_API_H
#define PLUGIN_API_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define WEAK __attribute__((weak))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_register;
enum { CB_NO_REGS, CB_R_REGS };
typedef void (*vcpu_udata_cb)(unsigned cpu, void *udata);

#if API >= 7
typedef void (*tb_trans_cb)(struct qemu_plugin_tb *, void *udata);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb, void *udata);
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, vcpu_udata_cb, void *udata);
#define REGISTER(what, id, callback) qemu_plugin_register_##what(id, callback, NULL)
#else
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*vcpu_simple_cb)(qemu_plugin_id_t, unsigned cpu);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, vcpu_simple_cb);
#define REGISTER(what, id, callback) qemu_plugin_register_##what(id, callback)
#endif

void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, vcpu_udata_cb, int flags, void *udata);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, vcpu_udata_cb, int flags, void *udata);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);

/* The public members of GLib's GArray and GByteArray. */
struct array {
	char *data;
	unsigned len;
};
struct bytes {
	uint8_t *data;
	unsigned len;
};
unsigned g_array_get_element_size(struct array *);
struct bytes *g_byte_array_new(void);
struct bytes *g_byte_array_set_size(struct bytes *, unsigned);

/* The members that all versions have; 11.0 added another. `feature` may be NULL. */
struct register_descriptor {
	struct qemu_plugin_register *handle;
	const char *name, *feature;
};
WEAK struct array *qemu_plugin_get_registers(void);
/* Appends the value. The result, int up to API 5 and bool from 6 on, is not used: the size of the bytes tells. */
WEAK void qemu_plugin_read_register(struct qemu_plugin_register *, struct bytes *);

#endif
