// Package nft keeps crisp's nftables rules in the kernel: host ports,
// masquerading, and the check that a pod sends only as itself.
//
// There are two tables of one name, in the families inet and bridge. The rules
// (ruleset.go, readable as nft(8) prints them) depend on the [Config] only; a
// [Pod] adds elements to sets and maps. [Table] holds all of it in memory and is
// the owner: the kernel's copy is replaced whole, in one transaction, whenever
// it might differ (at start, after any surprise, after a foreign program touched
// it: see [Monitor]). Nothing but our two tables is ever changed.
//
// Rules are built from the expressions and types of github.com/google/nftables,
// and sent by package nlbatch, one system call per change.
package nft
