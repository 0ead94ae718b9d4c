package main

import "golang.org/x/sys/unix"

// auditArch is what a seccomp filter sees as the architecture of our own calls.
const auditArch = unix.AUDIT_ARCH_X86_64
