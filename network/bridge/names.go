package bridge

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	stdnet "net"
	"net/netip"
	"regexp"
	"strings"
)

// Names of links have at most 15 bytes (IFNAMSIZ minus the NUL). Ours are
//
//	cr 1a2b 0123456789
//	│  │    └ 9 hex digits of the pod's id
//	│  └ 4 hex digits of a hash of the bridge's name: two crisps on one host do not
//	│    collect each other's links
//	└ always
const (
	linkWord    = "cr"
	bridgeHex   = 4
	podHex      = 9
	podLink     = "eth0" // in the pod; kubelet and cAdvisor look for it by this name
	maxLinkName = 15
)

var linkPattern = regexp.MustCompile(`^` + linkWord + `[0-9a-f]{13}$`)

// linkPrefix is what the names of all our links start with.
func linkPrefix(bridge string) string {
	sum := sha256.Sum256([]byte(bridge))
	return linkWord + hex.EncodeToString(sum[:])[:bridgeHex]
}

// linkName is the name of a pod's link on the host; try is 0, and more when the
// name turned out to be taken.
func linkName(bridge, podID string, try int) string {
	digits := podID
	if try > 0 || len(podID) < podHex || strings.Trim(podID[:podHex], "0123456789abcdef") != "" {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", podID, try))
		digits = hex.EncodeToString(sum[:])
	}
	return linkPrefix(bridge) + digits[:podHex]
}

// podMAC is the address of a pod's eth0: locally administered (RFC 7042 2.1) and a
// function of its primary IP address, so that whoever still remembers a neighbour
// of that address remembers the right one. 0a:58 and four bytes is what CNI's
// bridge plugin used too.
func podMAC(primary netip.Addr) stdnet.HardwareAddr { return macFrom(0x58, primary) }

// portMAC is the address of the other end. It is set only because a random one
// invites systemd-udevd to set another (MACAddressPolicy=persistent).
func portMAC(primary netip.Addr) stdnet.HardwareAddr { return macFrom(0x59, primary) }

// bridgeMAC is the bridge's address. Left alone, a bridge takes the lowest of its
// ports', and changes it when ports come and go.
func bridgeMAC(bridge string) stdnet.HardwareAddr {
	h := fnv.New32a()
	h.Write([]byte(bridge))
	return stdnet.HardwareAddr(h.Sum([]byte{0x0a, 0x5a}))
}

func macFrom(second byte, ip netip.Addr) stdnet.HardwareAddr {
	if ip.Is4() {
		b := ip.As4()
		return append(stdnet.HardwareAddr{0x0a, second}, b[:]...)
	}
	h := fnv.New32a()
	h.Write(ip.AsSlice())
	return stdnet.HardwareAddr(h.Sum([]byte{0x0a, second}))
}

// linkLocal is the IPv6 link-local address that the kernel derives from a MAC
// (modified EUI-64, RFC 4291 appendix A).
func linkLocal(mac stdnet.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
}
