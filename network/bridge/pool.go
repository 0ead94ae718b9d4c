package bridge

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/crisp-cri/crisp/network"
)

// coolDown is how long a freed address rests while others are free: as long as
// the kernel remembers its flows and neighbours at most (TIME_WAIT and UDP streams
// are kept for 120 s in connection tracking).
const coolDown = 2 * time.Minute

// pool hands out the addresses of one range, next fit: the search goes on where it
// ended, so that an address comes back only after all others had their turn. It is
// not safe for concurrent use.
//
// The first address of the range belongs to the bridge; in IPv4 the network and
// the broadcast address are nobody's, in IPv6 the zero address (the anycast address
// of its routers, RFC 4291 2.6.1).
type pool struct {
	prefix  netip.Prefix // masked
	gateway netip.Addr
	last    netip.Addr // of those handed out
	size    uint64     // number of addresses to hand out; MaxUint64: at least as many
	next    netip.Addr // where the search goes on
	used    map[netip.Addr]string
	// freed lists what was released lately, oldest first; resting says when, for
	// those of them that are still free.
	freed   []freedAddr
	resting map[netip.Addr]time.Time
	now     func() time.Time
}

type freedAddr struct {
	addr netip.Addr
	at   time.Time
}

// newPool makes a pool for a range that checkRange accepts.
func newPool(prefix netip.Prefix, now func() time.Time) *pool {
	prefix = prefix.Masked()
	p := &pool{prefix: prefix, gateway: gatewayOf(prefix), last: lastAddr(prefix), used: map[netip.Addr]string{}, resting: map[netip.Addr]time.Time{}, now: now}
	hostBits := prefix.Addr().BitLen() - prefix.Bits()
	if hostBits >= 64 {
		p.size = math.MaxUint64
	} else {
		p.size = 1<<hostBits - 2
	}
	if prefix.Addr().Is4() {
		p.last = p.last.Prev() // the broadcast address
		p.size--
	}
	p.next = p.gateway.Next()
	return p
}

// gatewayOf is the bridge's own address in a range.
func gatewayOf(prefix netip.Prefix) netip.Addr { return prefix.Masked().Addr().Next() }

// lastAddr is the highest address of a range.
func lastAddr(prefix netip.Prefix) netip.Addr {
	b := prefix.Masked().Addr().AsSlice()
	for i := prefix.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b) // Always 4 or 16 bytes.
	return a
}

// take reserves an address for owner. It returns network.ErrExhausted, with the
// numbers, when all are in use.
func (p *pool) take(owner string) (netip.Addr, error) {
	if uint64(len(p.used)) >= p.size {
		return netip.Addr{}, fmt.Errorf("pod range %s: %d of %d addresses in use: %w", p.prefix, len(p.used), p.size, network.ErrExhausted)
	}
	p.wake()
	a := p.next
	// At most every address that is not free is passed over.
	for range uint64(len(p.used)+len(p.resting)) + 1 {
		if _, rests := p.resting[a]; p.used[a] == "" && !rests {
			p.take1(a, owner)
			return a, nil
		}
		if a = p.after(a); a == p.next {
			break // once around: all that are free are resting
		}
	}
	// The one that has rested longest is better than none.
	for _, f := range p.freed {
		if p.resting[f.addr].Equal(f.at) {
			p.take1(f.addr, owner)
			return f.addr, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("pod range %s: no free address found among %d in use of %d: %w", p.prefix, len(p.used), p.size, network.ErrExhausted)
}

func (p *pool) take1(a netip.Addr, owner string) {
	p.used[a] = owner
	delete(p.resting, a)
	p.next = p.after(a)
}

// after is the address tried after a, around the end of the range.
func (p *pool) after(a netip.Addr) netip.Addr {
	if a == p.last {
		return p.gateway.Next()
	}
	return a.Next()
}

// wake lets addresses go that have rested long enough.
func (p *pool) wake() {
	limit := p.now().Add(-coolDown)
	for len(p.freed) > 0 && p.freed[0].at.Before(limit) {
		if f := p.freed[0]; p.resting[f.addr].Equal(f.at) {
			delete(p.resting, f.addr)
		}
		p.freed = p.freed[1:]
	}
}

// reserve takes a certain address, found in a record, and lets the search go on
// behind the highest one. It reports who has it if someone else does.
func (p *pool) reserve(a netip.Addr, owner string) (holder string, ok bool) {
	if h := p.used[a]; h != "" && h != owner {
		return h, false
	}
	p.used[a] = owner
	delete(p.resting, a)
	if !a.Less(p.next) {
		p.next = p.after(a)
	}
	return owner, true
}

// release frees an address if owner has it.
func (p *pool) release(a netip.Addr, owner string) {
	if owner == "" || p.used[a] != owner {
		return
	}
	delete(p.used, a)
	f := freedAddr{a, p.now()}
	p.freed = append(p.freed, f)
	p.resting[a] = f.at
}
