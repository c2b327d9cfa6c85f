@ The mailbox payload, A32. r11 holds the mailbox, r10 the order under way; nothing else survives
@ from one order to the next, and there is no stack. Offsets and gadgets come from payload.py.
    .arch   armv7ve
    .arch_extension virt
    .arm
    .text
    .include "layout.inc"

    .global _start
_start:                                 @ r0: address of this vCPU's mailbox
    mov     r11, r0
    add     r10, r11, #ORDERS
    ldr     r1, =vectors
    mcr     p15, 0, r1, c12, c0, 0      @ VBAR
    isb
    b       next

ring:                                   @ all orders done: tell the host, which comes back with more
    ldr     r1, =DOORBELL
    str     r0, [r1]
next:
    ldr     r0, [r11, #DONE]
    ldr     r1, [r11, #PENDING]
    cmp     r0, r1
    bhs     ring
    add     r10, r11, #ORDERS
    add     r10, r10, r0, lsl #6
    ldr     r1, [r10, #OP]
    ldr     r12, [r10, #ADDR]
    add     pc, pc, r1, lsl #2
    nop
    b       done                        @ OP_NOP
    b       access
    b       execute
    b       hypercall
    b       spin
    b       fill
    b       check
    b       mmu
    b       flush
    b       hammer
    b       interrupt

done:
    mov     r0, #STATUS_OK
    str     r0, [r10, #STATUS]
after:
    ldr     r0, [r11, #DONE]
    add     r0, r0, #1
    str     r0, [r11, #DONE]
    b       next

access:                                 @ one load or store: gadget number COUNT, 16 bytes each
    ldr     r0, [r10, #COUNT]
    ldr     r1, =gadgets
    adr     lr, done
    add     pc, r1, r0, lsl #4

execute:
    adr     lr, done
    bx      r12

hypercall:                              @ SMC calling convention: function id and three arguments
    mov     r0, r12
    ldr     r1, [r10, #VALUE]
    ldr     r2, [r10, #COUNT]
    ldr     r3, [r10, #STRIDE]
    hvc     #0
    str     r0, [r10, #VALUE]
    b       done

spin:                                   @ stay inside the guest until the host says stop, or for COUNT rounds if not 0
    mov     r0, #1
    str     r0, [r11, #SPINNING]
    ldr     r2, [r10, #COUNT]
1:  ldr     r1, [r11, #STOP]
    cmp     r1, #0
    bne     2f
    cmp     r2, #0
    beq     1b
    subs    r2, r2, #1
    bne     1b
2:  mov     r0, #0
    str     r0, [r11, #SPINNING]
    b       done

fill:                                   @ COUNT words STRIDE apart: each its own address ^ VALUE
    ldr     r0, [r10, #COUNT]
    ldr     r1, [r10, #STRIDE]
    ldr     r2, [r10, #VALUE]
1:  cmp     r0, #0
    beq     done
    eor     r3, r12, r2
    str     r3, [r12]
    add     r12, r12, r1
    sub     r0, r0, #1
    b       1b

check:                                  @ the reverse: VALUE <- mismatches, FAR <- the first of them
    ldr     r0, [r10, #COUNT]
    ldr     r1, [r10, #STRIDE]
    ldr     r2, [r10, #VALUE]
    mov     r4, #0
1:  cmp     r0, #0
    beq     3f
    ldr     r3, [r12]
    eor     r5, r12, r2
    cmp     r3, r5
    beq     2f
    cmp     r4, #0
    streq   r12, [r10, #FAR]
    add     r4, r4, #1
2:  add     r12, r12, r1
    sub     r0, r0, #1
    b       1b
3:  str     r4, [r10, #VALUE]
    b       done

hammer:                                 @ add 1 to COUNT words STRIDE apart, again and again until the
    mov     r0, #1                      @ host says stop: VALUE <- rounds
    str     r0, [r11, #SPINNING]
    ldr     r1, [r10, #STRIDE]
    mov     r2, #0
1:  ldr     r0, [r10, #COUNT]
    mov     r4, r12
2:  ldr     r3, [r4]
    add     r3, r3, #1
    str     r3, [r4]
    add     r4, r4, r1
    subs    r0, r0, #1
    bne     2b
    add     r2, r2, #1
    ldr     r3, [r11, #STOP]
    cmp     r3, #0
    beq     1b
    str     r2, [r10, #VALUE]
    mov     r0, #0
    str     r0, [r11, #SPINNING]
    b       done

interrupt:                              @ wait for one: VALUE <- what the GICv2 at ADDR says it was
    cpsie   i
1:  wfi
    b       1b
interrupted:                            @ GICC_IAR acknowledges, GICC_EOIR ends it
    cps     #0x13
    ldr     r0, [r12, #0x0c]
    str     r0, [r12, #0x10]
    str     r0, [r10, #VALUE]
    b       done

mmu:                                    @ ADDR TTBR0, VALUE TTBCR, COUNT MAIR0, STRIDE SCTLR
    ldr     r0, [r10, #COUNT]
    mcr     p15, 0, r0, c10, c2, 0
    ldr     r0, [r10, #VALUE]
    mcr     p15, 0, r0, c2, c0, 2
    isb
    ldr     r1, [r10, #ADDR + 4]
    mcrr    p15, 0, r12, r1, c2
    ldr     r0, [r10, #STRIDE]
    mcr     p15, 0, r0, c8, c7, 0       @ TLBIALL
    dsb
    isb
    mcr     p15, 0, r0, c1, c0, 0
    isb
    b       done

flush:
    mcr     p15, 0, r0, c8, c7, 0       @ TLBIALL
    dsb
    isb
    b       done

    .macro  keep_registers
    .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12
    str     r\n, [r11, #REGISTERS + 4 * \n]
    .endr
    .endm

undefined:
    keep_registers
    mov     r0, #STATUS_UNDEFINED
    sub     r3, lr, #4
    mov     r1, #0
    mov     r2, #0
    b       report
prefetch_abort:
    keep_registers
    mov     r0, #STATUS_PREFETCH_ABORT
    sub     r3, lr, #4
    mrc     p15, 0, r1, c5, c0, 1       @ IFSR
    mrc     p15, 0, r2, c6, c0, 2       @ IFAR
    b       report
data_abort:
    keep_registers
    mov     r0, #STATUS_DATA_ABORT
    sub     r3, lr, #8
    mrc     p15, 0, r1, c5, c0, 0       @ DFSR
    mrc     p15, 0, r2, c6, c0, 0       @ DFAR
    b       report
unexpected:
    mov     r0, #STATUS_UNEXPECTED
    mov     r3, lr
    mov     r1, #0
    mov     r2, #0
report:
    cps     #0x13                       @ back to Supervisor, the mode orders run in
    str     r1, [r10, #SYNDROME]
    str     r2, [r10, #FAR]
    str     r3, [r10, #PC]
    str     r0, [r10, #STATUS]
    b       after

    .ltorg
    .balign 32
vectors:
    b       unexpected
    b       undefined
    b       unexpected
    b       prefetch_abort
    b       data_abort
    b       unexpected
    b       interrupted
    b       unexpected

    .balign 16
gadgets:
    .include "gadgets.inc"
