// The conformance program for AArch64, at EL2 with the MMU off. See layout.py for the numbers.
//
// x20 control block, x21 last request, x22 probes left, x23 probe, x24 result: guests leave them alone.
    .include "layout.inc"
    .text
    .globl _start
_start:
    ldr     x20, =CONTROL
    mrs     x0, CurrentEL
    str     x0, [x20, #LEVEL]
    adr     x0, vectors
    msr     vbar_el2, x0
    mov     x21, #0
    mrs     x0, id_aa64mmfr0_el1
    mrs     x1, id_aa64mmfr1_el1
    mrs     x2, s3_0_c0_c7_2            // ID_AA64MMFR2_EL1
    str     x0, [x20, #MMFR0]
    str     x1, [x20, #MMFR1]
    str     x2, [x20, #MMFR2]

answer:
    dmb     sy
    str     x21, [x20, #ANSWER]
await:
    ldr     x0, [x20, #REQUEST]
    cmp     x0, x21
    b.eq    await
    mov     x21, x0
    dmb     sy

    .macro load register, field
    ldr     x0, [x20, #\field]
    msr     \register, x0
    .endm
    load    hcr_el2, HCR
    load    vtcr_el2, VTCR
    load    vttbr_el2, VTTBR
    load    sctlr_el1, SCTLR
    load    tcr_el1, TCR
    load    ttbr0_el1, TTBR0
    load    ttbr1_el1, TTBR1
    load    mair_el1, MAIR
    load    vbar_el1, VBAR
    isb
    tlbi    alle1
    ic      iallu
    dsb     sy
    isb
    ldr     x22, [x20, #COUNT]
    ldr     x23, =PROBES
    ldr     x24, =RESULTS

next:
    cbz     x22, answer
    sub     x22, x22, #1
    ldr     x0, [x23, #ADDRESS]
    ldr     x2, [x23, #OP]
    adr     x3, operations
    add     x3, x3, x2, lsl #3
    br      x3
operations:
    at      s12e1r, x0
    b       translated
    at      s12e1w, x0
    b       translated
    at      s12e0r, x0
    b       translated
    at      s12e0w, x0
    b       translated

    // Run the guest at PC until it traps: the address in x16, a value in x1 (and x2, for pairs).
    mov     x16, x0
    ldr     x0, [x23, #PC]
    msr     elr_el2, x0
    ldr     x0, [x23, #PSTATE]
    msr     spsr_el2, x0
    ldr     x1, [x23, #VALUE]
    lsr     x2, x1, #32
    eret

translated:
    isb
    mrs     x0, par_el1
    str     x0, [x24, #R_VALUE]
    mov     x0, #PAR
advance:
    str     x0, [x24, #R_KIND]
    add     x23, x23, #RECORD
    add     x24, x24, #RECORD
    b       next

trapped:
    str     x1, [x24, #R_VALUE]
    mov     x0, #TRAPPED
record:
    mrs     x1, esr_el2
    mrs     x2, far_el2
    mrs     x3, hpfar_el2
    mrs     x4, elr_el2
    stp     x1, x2, [x24, #R_ESR]
    stp     x3, x4, [x24, #R_HPFAR]
    mrs     x1, esr_el1
    mrs     x2, far_el1
    stp     x1, x2, [x24, #R_ESR1]
    b       advance
aborted:
    mov     x0, #ABORTED
    b       record

    .macro  vector target
    .balign 128
    b       \target
    .endm

    .balign 2048
vectors:
    .rept   4                           // current EL with SP_EL0: does not happen
    vector  .
    .endr
    vector  aborted                     // an AT instruction met an external abort on its walk
    .rept   3
    vector  .
    .endr
    vector  trapped                     // the guest
    .rept   3
    vector  .
    .endr
    .ltorg

    // The harness: a page of its own.
    .section .harness, "ax"
harness:
    .set    vector, 0
    .rept   16
    .balign 128
    hvc     #vector
    .set    vector, vector + 1
    .endr
    .org    harness + GADGETS
    .include "gadgets.inc"
