/*
 * What the probe uses of QEMU's plugin API (include/qemu/qemu-plugin.h; include/plugins/qemu-plugin.h in 11.x). It is
 * declared here because Debian packages no header, and because one source is compiled for every version of the API.
 *
 * API is the version to compile for, framework/arm_kvm/recorder/library.py asks QEMU for it. Of the changes up to 7 two matter:
 * from 7 on callbacks get user data instead of the plugin's id; and registers can be read since QEMU 9.0, which raised no
 * version, so that those functions are weak here.
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

/* GLib's GArray and GByteArray, as far as they are public. */
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

/* What all versions have of it: 11.0 added a member. `feature` may be NULL. */
struct register_descriptor {
	struct qemu_plugin_register *handle;
	const char *name, *feature;
};
WEAK struct array *qemu_plugin_get_registers(void);
/* Appends the value. Its result is left out: int up to API 5, bool from 6 on; the bytes tell. */
WEAK void qemu_plugin_read_register(struct qemu_plugin_register *, struct bytes *);

#endif
