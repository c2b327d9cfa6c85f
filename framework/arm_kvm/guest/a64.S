// The payload for A64 guests. x20 points to the mailbox, x21 to the current order; no other register
// is preserved between orders, and there is no stack. payload.py generates the offsets and gadgets.
    .arch   armv8-a
    .text
    .include "layout.inc"

    .global _start
_start:                                 // x0: address of this vCPU's mailbox
    mov     x20, x0
    add     x21, x20, #ORDERS
    adr     x1, vectors
    msr     vbar_el1, x1
    isb
    b       next

ring:                                   // all orders are done: exit to the VMM, which returns with new ones
    ldr     x1, =DOORBELL
    str     w0, [x1]
next:
    ldr     w0, [x20, #DONE]
    ldr     w1, [x20, #PENDING]
    cmp     w0, w1
    b.hs    ring
    add     x21, x20, #ORDERS
    add     x21, x21, x0, lsl #6
    ldr     x1, [x21, #OP]
    ldr     x16, [x21, #ADDR]
    adr     x2, 1f
    add     x2, x2, x1, lsl #2
    br      x2
1:  b       done                        // OP_NOP
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
    mov     x0, #STATUS_OK
    str     x0, [x21, #STATUS]
after:
    ldr     w0, [x20, #DONE]
    add     w0, w0, #1
    str     w0, [x20, #DONE]
    b       next

access:                                 // one load or store: gadget number COUNT; a gadget has 16 bytes
    ldr     x0, [x21, #COUNT]
    adr     x1, gadgets
    add     x1, x1, x0, lsl #4
    adr     x30, done
    br      x1

execute:
    adr     x30, done
    br      x16

hypercall:                              // SMC calling convention: function id and three arguments
    mov     x0, x16
    ldr     x1, [x21, #VALUE]
    ldr     x2, [x21, #COUNT]
    ldr     x3, [x21, #STRIDE]
    hvc     #0
    str     x0, [x21, #VALUE]
    b       done

spin:                                   // loop until the VMM sets STOP, or COUNT times if that is not 0
    mov     w0, #1
    str     w0, [x20, #SPINNING]
    ldr     x2, [x21, #COUNT]
1:  ldr     w1, [x20, #STOP]
    cbnz    w1, 2f
    cbz     x2, 1b
    subs    x2, x2, #1
    b.ne    1b
2:  str     wzr, [x20, #SPINNING]
    b       done

fill:                                   // store address ^ VALUE to each of COUNT words STRIDE apart
    ldr     x0, [x21, #COUNT]
    ldr     x1, [x21, #STRIDE]
    ldr     x2, [x21, #VALUE]
1:  cbz     x0, done
    eor     x3, x16, x2
    str     w3, [x16]
    add     x16, x16, x1
    sub     x0, x0, #1
    b       1b

check:                                  // compare with fill: VALUE <- mismatches, FAR <- address of the first
    ldr     x0, [x21, #COUNT]
    ldr     x1, [x21, #STRIDE]
    ldr     x2, [x21, #VALUE]
    mov     x4, #0
1:  cbz     x0, 3f
    ldr     w3, [x16]
    eor     x5, x16, x2
    cmp     w3, w5
    b.eq    2f
    cbnz    x4, 4f
    str     x16, [x21, #FAR]
4:  add     x4, x4, #1
2:  add     x16, x16, x1
    sub     x0, x0, #1
    b       1b
3:  str     x4, [x21, #VALUE]
    b       done

hammer:                                 // add 1 to each of COUNT words STRIDE apart, in rounds until the
    mov     w0, #1                      // VMM sets STOP: VALUE <- rounds
    str     w0, [x20, #SPINNING]
    ldr     x1, [x21, #STRIDE]
    mov     x2, #0
1:  ldr     x0, [x21, #COUNT]
    mov     x4, x16
2:  ldr     w3, [x4]
    add     w3, w3, #1
    str     w3, [x4]
    add     x4, x4, x1
    sub     x0, x0, #1
    cbnz    x0, 2b
    add     x2, x2, #1
    ldr     w3, [x20, #STOP]
    cbz     w3, 1b
    str     x2, [x21, #VALUE]
    str     wzr, [x20, #SPINNING]
    b       done

interrupt:                              // wait for an interrupt: VALUE <- GICC_IAR of the GICv2 at ADDR
    msr     daifclr, #2
1:  wfi
    b       1b
interrupted:                            // acknowledge with GICC_IAR, end with GICC_EOIR
    ldr     w0, [x16, #0x0c]
    str     w0, [x16, #0x10]
    str     x0, [x21, #VALUE]
    b       done

mmu:                                    // ADDR TTBR0, VALUE TCR, COUNT MAIR, STRIDE SCTLR
    ldr     x0, [x21, #COUNT]
    msr     mair_el1, x0
    ldr     x0, [x21, #VALUE]
    msr     tcr_el1, x0
    msr     ttbr0_el1, x16
    isb
    tlbi    vmalle1
    dsb     nsh
    isb
    ldr     x0, [x21, #STRIDE]
    msr     sctlr_el1, x0
    isb
    b       done

flush:
    tlbi    vmalle1
    dsb     nsh
    isb
    b       done

exception:
    .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30
    str     x\n, [x20, #REGISTERS + 8 * \n]
    .endr
    mrs     x0, esr_el1
    str     x0, [x21, #SYNDROME]
    mrs     x0, far_el1
    str     x0, [x21, #FAR]
    mrs     x0, elr_el1
    str     x0, [x21, #PC]
    mov     x0, #STATUS_EXCEPTION
    str     x0, [x21, #STATUS]
    b       after
unexpected:
    mov     x0, #STATUS_UNEXPECTED
    str     x0, [x21, #STATUS]
    b       after

    .ltorg
    .balign 2048
vectors:                                // only those of EL1h are used: synchronous, and IRQ for the interrupt order
    .rept 4
    b       unexpected
    .balign 128
    .endr
    b       exception
    .balign 128
    b       interrupted
    .balign 128
    .rept 10
    b       unexpected
    .balign 128
    .endr

    .balign 16
gadgets:
    .include "gadgets.inc"
