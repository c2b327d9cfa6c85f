@ The payload for A32 guests. r11 points to the mailbox, r10 to the current order; no other register
@ is preserved between orders, and there is no stack. payload.py generates the offsets and gadgets.
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

ring:                                   @ all orders are done: exit to the VMM, which returns with new ones
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

access:                                 @ one load or store: gadget number COUNT; a gadget has 16 bytes
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

spin:                                   @ loop until the VMM sets STOP, or COUNT times if that is not 0
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

fill:                                   @ store address ^ VALUE to each of COUNT words STRIDE apart
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

check:                                  @ compare with fill: VALUE <- mismatches, FAR <- address of the first
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

hammer:                                 @ add 1 to each of COUNT words STRIDE apart, in rounds until the
    mov     r0, #1                      @ VMM sets STOP: VALUE <- rounds
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

interrupt:                              @ wait for an interrupt: VALUE <- GICC_IAR of the GICv2 at ADDR
    cpsie   i
1:  wfi
    b       1b
interrupted:                            @ acknowledge with GICC_IAR, end with GICC_EOIR
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
    cps     #0x13                       @ back to Supervisor mode, which orders run in
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
