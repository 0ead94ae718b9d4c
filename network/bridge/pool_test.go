package bridge

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/crisp-cri/crisp/network"
)

// clock is a time that only a test moves.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func TestPoolSizes(t *testing.T) {
	for _, tt := range []struct {
		in          string
		size        uint64
		first, last string
	}{
		{"10.1.2.0/24", 253, "10.1.2.2", "10.1.2.254"},
		{"10.1.2.4/30", 1, "10.1.2.6", "10.1.2.6"},
		{"10.0.0.0/8", 1<<24 - 3, "10.0.0.2", "10.255.255.254"},
		{"fd00::/126", 2, "fd00::2", "fd00::3"},
		{"fd00::/112", 1<<16 - 2, "fd00::2", "fd00::ffff"},
		{"fd00::/64", 1<<64 - 1, "fd00::2", "fd00::ffff:ffff:ffff:ffff"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			p := newPool(netip.MustParsePrefix(tt.in), time.Now)
			if p.size != tt.size || p.gateway.Next().String() != tt.first || p.last.String() != tt.last {
				t.Errorf("got %d addresses from %s to %s, want %d from %s to %s", p.size, p.gateway.Next(), p.last, tt.size, tt.first, tt.last)
			}
		})
	}
}

func TestPoolExhaustion(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"10.1.2.0/24", "pod range 10.1.2.0/24: 253 of 253 addresses in use"},
		{"fd00::/120", "pod range fd00::/120: 254 of 254 addresses in use"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			p := newPool(netip.MustParsePrefix(tt.in), time.Now)
			seen := map[netip.Addr]bool{}
			for range p.size {
				a, err := p.take("x")
				if err != nil {
					t.Fatal(err)
				}
				if seen[a] || !p.prefix.Contains(a) || a == p.gateway {
					t.Fatalf("address %s is not free or not a pod's", a)
				}
				seen[a] = true
			}
			_, err := p.take("y")
			if !errors.Is(err, network.ErrExhausted) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want ErrExhausted with %q", err, tt.want)
			}
			// The only free one is taken although it was in use a moment ago.
			freed := p.gateway.Next().Next()
			p.release(freed, "x")
			if a, err := p.take("y"); err != nil || a != freed {
				t.Errorf("got %v, %v, want %s", a, err, freed)
			}
		})
	}
}

func TestPoolRestsAddresses(t *testing.T) {
	c := &clock{time.Unix(1e9, 0)}
	p := newPool(netip.MustParsePrefix("10.0.0.0/29"), c.now) // .2 to .6
	take := func(want string) {
		t.Helper()
		if a, err := p.take("x"); err != nil || a.String() != want {
			t.Fatalf("got %v, %v, want %s", a, err, want)
		}
	}
	release := func(a string) { p.release(netip.MustParseAddr(a), "x") }
	take("10.0.0.2")
	take("10.0.0.3")
	release("10.0.0.2")
	take("10.0.0.4") // not the one that was just freed
	take("10.0.0.5")
	release("10.0.0.3")
	take("10.0.0.6")
	take("10.0.0.2") // all that are free are resting: the one that rests longest
	release("10.0.0.4")
	c.t = c.t.Add(coolDown + time.Second)
	take("10.0.0.3") // rested
	take("10.0.0.4")
	if _, err := p.take("x"); !errors.Is(err, network.ErrExhausted) {
		t.Fatalf("got %v, want ErrExhausted", err)
	}
}

// SEC-118: whatever happens, crashes included, no two pods have one address, and none
// is lost.
func TestPoolNeverGivesTwice(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 118))
		c := &clock{time.Unix(1e9, 0)}
		prefix := netip.MustParsePrefix([]string{"10.0.0.0/27", "fd00::/123", "10.0.0.0/24", "fd00::/64"}[rng.IntN(4)])
		p := newPool(prefix, c.now)
		records := map[string]netip.Addr{} // what is on disk
		for i := range 1000 {
			c.t = c.t.Add(time.Duration(rng.IntN(int(coolDown / 8))))
			switch owner := fmt.Sprint("pod", i); rng.IntN(10) {
			case 0: // the daemon dies and restores
				p = newPool(prefix, c.now)
				for o, a := range records {
					if holder, ok := p.reserve(a, o); !ok {
						t.Fatalf("seed %d: %s of %s is held by %s", seed, a, o, holder)
					}
				}
			case 1, 2, 3, 4:
				for o, a := range records {
					p.release(a, "somebody else") // no effect
					p.release(a, o)
					p.release(a, o) // idempotent
					delete(records, o)
					break
				}
			default:
				a, err := p.take(owner)
				if errors.Is(err, network.ErrExhausted) {
					if uint64(len(records)) != p.size {
						t.Fatalf("seed %d: exhausted with %d of %d: %v", seed, len(records), p.size, err)
					}
					continue
				}
				for o, other := range records {
					if other == a {
						t.Fatalf("seed %d: %s given to %s and %s", seed, a, o, owner)
					}
				}
				if !prefix.Contains(a) || a == p.gateway || a == prefix.Addr() || (a.Is4() && a == lastAddr(prefix)) {
					t.Fatalf("seed %d: %s is no pod's address", seed, a)
				}
				records[owner] = a
			}
			if len(p.used) != len(records) {
				t.Fatalf("seed %d: %d in use, %d recorded", seed, len(p.used), len(records))
			}
		}
	}
}

func TestPoolReserve(t *testing.T) {
	p := newPool(netip.MustParsePrefix("10.0.0.0/24"), time.Now)
	a := netip.MustParseAddr("10.0.0.9")
	if _, ok := p.reserve(a, "x"); !ok {
		t.Fatal("a free address cannot be reserved")
	}
	if _, ok := p.reserve(a, "x"); !ok {
		t.Fatal("not idempotent")
	}
	if holder, ok := p.reserve(a, "y"); ok || holder != "x" {
		t.Fatalf("got %q, %v, want it held by x", holder, ok)
	}
	if got, err := p.take("z"); err != nil || got.String() != "10.0.0.10" {
		t.Errorf("the search goes on at %v, %v, want 10.0.0.10", got, err)
	}
}

func BenchmarkPoolChurn(b *testing.B) {
	p := newPool(netip.MustParsePrefix("10.0.0.0/16"), time.Now)
	for b.Loop() {
		a, err := p.take("x")
		if err != nil {
			b.Fatal(err)
		}
		p.release(a, "x")
	}
}
