@ The conformance program for Armv7, in Hyp mode with the MMU off. See layout.py for the numbers.
@
@ r4 control block, r5 last request, r6 probes left, r7 probe, r8 result: guests leave them alone (no mode banks them
@ but FIQ, which nothing enters).
    .include "layout.inc"
    .arch   armv7ve
    .arm
    .text
    .globl  _start
_start:
    ldr     r4, =CONTROL
    mrs     r0, cpsr
    str     r0, [r4, #LEVEL]
    adr     r0, vectors
    mcr     p15, 4, r0, c12, c0, 0      @ HVBAR
    mov     r5, #0
answer:
    dmb
    str     r5, [r4, #ANSWER]
await:
    ldr     r0, [r4, #REQUEST]
    cmp     r0, r5
    beq     await
    mov     r5, r0
    dmb

    ldr     r0, [r4, #HCR]
    mcr     p15, 4, r0, c1, c1, 0
    ldr     r0, [r4, #VTCR]
    mcr     p15, 4, r0, c2, c1, 2
    ldrd    r0, r1, [r4, #VTTBR]
    mcrr    p15, 6, r0, r1, c2
    ldr     r0, [r4, #SCTLR]
    mcr     p15, 0, r0, c1, c0, 0
    ldr     r0, [r4, #TCR]
    mcr     p15, 0, r0, c2, c0, 2       @ TTBCR
    ldrd    r0, r1, [r4, #TTBR0]
    mcrr    p15, 0, r0, r1, c2
    ldrd    r0, r1, [r4, #TTBR1]
    mcrr    p15, 1, r0, r1, c2
    ldr     r0, [r4, #MAIR]
    mcr     p15, 0, r0, c10, c2, 0      @ MAIR0
    ldr     r0, [r4, #MAIR + 4]
    mcr     p15, 0, r0, c10, c2, 1      @ MAIR1
    ldr     r0, [r4, #VBAR]
    mcr     p15, 0, r0, c12, c0, 0
    isb
    mcr     p15, 4, r0, c8, c7, 4       @ TLBIALLNSNH
    mcr     p15, 0, r0, c7, c5, 0       @ ICIALLU
    dsb
    isb
    ldr     r6, [r4, #COUNT]
    ldr     r7, =PROBES
    ldr     r8, =RESULTS

next:
    cmp     r6, #0
    beq     answer
    sub     r6, r6, #1
    ldr     r0, [r7, #ADDRESS]
    ldr     r2, [r7, #OP]
    add     pc, pc, r2, lsl #3
    nop
    mcr     p15, 0, r0, c7, c8, 4       @ ATS12NSOPR
    b       translated
    mcr     p15, 0, r0, c7, c8, 5       @ ATS12NSOPW
    b       translated
    mcr     p15, 0, r0, c7, c8, 6       @ ATS12NSOUR
    b       translated
    mcr     p15, 0, r0, c7, c8, 7       @ ATS12NSOUW
    b       translated

    @ Run the guest at PC until it traps: the address in r12, a value in r1 (and r2, for pairs).
    mov     r12, r0
    ldr     r0, [r7, #PC]
    msr     ELR_hyp, r0
    ldr     r0, [r7, #PSTATE]
    msr     SPSR_cxsf, r0
    ldrd    r0, r1, [r7, #VALUE]
    mov     r2, r1
    mov     r1, r0
    eret

translated:
    isb
    mrrc    p15, 0, r0, r1, c7          @ PAR
    strd    r0, r1, [r8, #R_VALUE]
    mov     r0, #PAR
advance:
    mov     r1, #0
    strd    r0, r1, [r8, #R_KIND]
    add     r7, r7, #RECORD
    add     r8, r8, #RECORD
    b       next

trapped:
    str     r1, [r8, #R_VALUE]
    str     r2, [r8, #R_VALUE + 4]
    mov     r0, #TRAPPED
record:
    mrc     p15, 4, r1, c5, c2, 0       @ HSR
    str     r1, [r8, #R_ESR]
    mrc     p15, 4, r2, c6, c0, 0       @ HDFAR, and HIFAR in the upper half
    mrc     p15, 4, r3, c6, c0, 2
    strd    r2, r3, [r8, #R_FAR]
    mrc     p15, 4, r1, c6, c0, 4
    str     r1, [r8, #R_HPFAR]
    mrs     r1, ELR_hyp
    str     r1, [r8, #R_ELR]
    mrc     p15, 0, r2, c5, c0, 0       @ DFSR, IFSR
    mrc     p15, 0, r3, c5, c0, 1
    strd    r2, r3, [r8, #R_ESR1]
    mrc     p15, 0, r2, c6, c0, 0       @ DFAR, IFAR
    mrc     p15, 0, r3, c6, c0, 2
    strd    r2, r3, [r8, #R_FAR1]
    b       advance
aborted:
    mov     r0, #ABORTED
    b       record

    .balign 32
vectors:
    b       .
    b       .
    b       .
    b       .
    b       aborted                     @ Hyp mode's own data abort: an AT instruction met an external abort
    b       trapped                     @ the guest
    b       .
    b       .
    .ltorg

    @ The harness: a page of its own.
    .section .harness, "ax"
harness:
    .set    vector, 0
    .rept   8
    hvc     #vector
    .set    vector, vector + 1
    .endr
    .org    harness + GADGETS
    .include "gadgets.inc"
