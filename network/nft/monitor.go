package nft

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network/netns"
)

// monitorBuffer is the socket's receive buffer in bytes: other programs' rulesets
// pass through it too, and an overflow costs a rebuild.
const monitorBuffer = 4 << 20

// Monitor tells when somebody else changed our tables. The kernel notifies after
// each transaction, whoever made it; the notification carries the address of the
// socket that it came from, so our own are passed over.
type Monitor struct {
	conn  *netlink.Conn
	owner uint32 // the port id of our own changes
	table string
	// closed before conn is: the socket's own error for that is no sentinel.
	closed atomic.Bool
	// touched: the transaction that is being reported changed our tables.
	touched bool
}

// NewMonitor starts to listen; nothing that happens from now on is missed.
func (t *Table) NewMonitor(table string) (*Monitor, error) {
	m := &Monitor{owner: t.conn.PortID(), table: table}
	err := netns.Do(t.ns, func() (err error) {
		m.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot watch nftables: open netlink socket: %w", err)
	}
	// A smaller buffer only means more rebuilds.
	_ = m.conn.SetReadBuffer(monitorBuffer)
	if err := m.conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		_ = m.conn.Close() // The first error tells.
		return nil, fmt.Errorf("cannot watch nftables: join group: %w", err)
	}
	return m, nil
}

// Close makes Next return os.ErrClosed.
func (m *Monitor) Close() error {
	m.closed.Store(true)
	return m.conn.Close()
}

// Next waits until a transaction of somebody else has touched our tables, or may
// have: when notifications were lost, it returns too. After Close it returns
// os.ErrClosed. It must not be called concurrently.
func (m *Monitor) Next() error {
	for {
		msgs, err := m.conn.Receive()
		switch {
		case err != nil && m.closed.Load():
			return os.ErrClosed
		case errors.Is(err, unix.ENOBUFS):
			m.touched = false
			return nil
		case err != nil:
			return fmt.Errorf("cannot watch nftables: %w", err)
		}
		over := false
		for _, msg := range msgs {
			m.touched = m.touched || m.concerns(msg)
			over = over || (m.touched && uint16(msg.Header.Type) == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN)
		}
		if over {
			m.touched = false
			return nil
		}
	}
}

// concerns reports whether msg is a foreign change of one of our tables. Every
// nftables message has the name of its table as attribute 1 (NFTA_TABLE_NAME,
// NFTA_CHAIN_TABLE, NFTA_RULE_TABLE …), but the last of a transaction, NEWGEN.
func (m *Monitor) concerns(msg netlink.Message) bool {
	typ := uint16(msg.Header.Type)
	if typ>>8 != unix.NFNL_SUBSYS_NFTABLES || typ&0xff == unix.NFT_MSG_NEWGEN || msg.Header.PID == m.owner || len(msg.Data) < 4 {
		return false
	}
	if f := msg.Data[0]; f != unix.NFPROTO_INET && f != unix.NFPROTO_BRIDGE {
		return false
	}
	attrs, err := netlink.NewAttributeDecoder(msg.Data[4:])
	if err != nil {
		return true // Not understood: assume the worst.
	}
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_TABLE_NAME {
			return string(bytes.TrimRight(attrs.Bytes(), "\x00")) == m.table
		}
	}
	return attrs.Err() != nil
}
