"""The guests' payload, a program that carries out orders from a mailbox, and the driver that gives it orders."""
