package check

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var networkProbes = []Probe{
	{"network", "network namespace", Required, "pods have one each", inScratchNetNS(func() error { return nil })},
	{"network", "veth, bridge", Required, "pods are linked by veth pairs and a bridge", inScratchNetNS(tryVethAndBridge)},
	{"network", "nftables nat", Required, "masquerading and host ports are nft rules", inScratchNetNS(tryNftables)},
	{"network", "IPv6", Wanted, "pods have IPv4 only", inScratchNetNS(tryIPv6)},
	{"network", "ip_forward", Info, "crispd switches it on when it makes the bridge", askForward("/proc/sys/net/ipv4/ip_forward")},
	{"network", "IPv6 forwarding", Info, "crispd switches it on when it makes the bridge", askForward("/proc/sys/net/ipv6/conf/all/forwarding")},
}

// inScratchNetNS asks by trying something in a network namespace of its own, on
// a thread that is never used again: it ends with its goroutine.
func inScratchNetNS(try func() error) func(*host) Answer {
	return func(*host) Answer {
		answer := make(chan Answer, 1) // the one answer must not keep the thread waiting
		go func() {
			runtime.LockOSThread() // not unlocked: the thread is in the namespace and must die
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				answer <- verdictOf(os.NewSyscallError("unshare(CLONE_NEWNET)", err))
				return
			}
			answer <- verdictOf(try())
		}()
		return <-answer
	}
}

func tryVethAndBridge() error {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0", MasterIndex: br.Index}, PeerName: "v1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	if err := netlink.LinkSetHairpin(veth, true); err != nil {
		return fmt.Errorf("set hairpin: %w", err)
	}
	return nil
}

// tryNftables makes what the embedded bridge makes: nat chains with fib and masquerade.
func tryNftables() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "check"})
	pre := c.AddChain(&nftables.Chain{
		Table: t, Name: "pre", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
	})
	post := c.AddChain(&nftables.Chain{
		Table: t, Name: "post", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	// fib daddr type
	c.AddRule(&nftables.Rule{Table: t, Chain: pre, Exprs: []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}}})
	c.AddRule(&nftables.Rule{Table: t, Chain: post, Exprs: []expr.Any{&expr.Masq{}}})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nft table with nat, fib, masquerade: %w", err)
	}
	return nil
}

func tryIPv6() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("fd00::1/128")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(lo, addr); err != nil {
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%w: net.ipv6.conf.default.disable_ipv6 is on", unix.EOPNOTSUPP)
		}
		return fmt.Errorf("add address: %w", err)
	}
	return nil
}

func askForward(file string) func(*host) Answer {
	return func(*host) Answer {
		data, err := os.ReadFile(file)
		switch {
		case err != nil:
			return unknown("%v", err)
		case string(trim(data)) == "0":
			return no("off")
		}
		return yes("on")
	}
}
