package bridge

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// whole asks the kernel for a list until it gives a whole one. A list that changes while it is read comes marked as
// such (NLM_F_DUMP_INTR, rtnetlink(7)), and is to be asked for again: pods come and go meanwhile, and a list of links with
// some missing would be acted upon. Each round is one list; it ends when nothing changes for as long as that takes.
func whole[T any](list func() ([]T, error)) ([]T, error) {
	for {
		l, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return l, err
		}
	}
}
