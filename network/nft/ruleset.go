package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Config is what the rules depend on besides the pods.
type Config struct {
	// Table is the name of our tables, in the families inet and bridge.
	Table string
	// Bridge is the name of the bridge that the pods are ports of.
	Bridge string
	// PortPrefix is what the names of all ports of the bridge start with; no
	// other link on the host may have such a name.
	PortPrefix string
	// Subnets are all pod ranges in use, new and old.
	Subnets []netip.Prefix
	// Gateway4 and Gateway6 are addresses of the bridge. Connections from the
	// host's loopback address to a host port get them as their source. Zero: no
	// such connections in that family.
	Gateway4, Gateway6 netip.Addr
	// Masquerade hides pods behind the host's address when they talk to the
	// outside, except to the ranges in MasqueradeExcept.
	Masquerade       bool
	MasqueradeExcept []netip.Prefix
	// AntiSpoof lets a pod send only from its own addresses.
	AntiSpoof bool
}

// Priorities of our base chains. Our NAT runs after everybody else's at the
// standard priorities (libnftables: dstnat -100, srcnat 100), and the first
// translation wins: a foreign, more specific rule is never shadowed
// (CVE-2019-9946).
const (
	prioRaw        = -300 // before connection tracking (-200)
	prioDNAT       = -100 + 10
	prioSNAT       = 100 + 10
	prioAfterNAT   = 100 + 10 // input hook: after the translation back
	prioBridge     = -300     // bridge family: before everything
	clientsTimeout = 5 * 24 * time.Hour
	clientsSize    = 65536
)

// rule is one rule twice: as nft(8) prints it, and as the kernel runs it.
type rule struct {
	cli   string
	exprs []any // expr.Any, or *writeAddr6
}

type chain struct {
	name string
	typ  nftables.ChainType // "": not a base chain
	hook *nftables.ChainHook
	prio int32
	rule []rule
}

// setID names our sets and maps.
type setID int

const (
	ports4 setID = iota
	ports6
	addrPorts4
	addrPorts6
	local4
	localAddr4
	local6
	published
	clients
	own4
	own6
	numSets
)

type set struct {
	name string
	key  nftables.SetDatatype
	data *nftables.SetDatatype // nil: a set, not a map
	// dynamic: filled by the packet path, not by us.
	dynamic bool
	bridge  bool // in the table of family bridge
}

var (
	protoPort     = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	protoPortPort = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInetService)
	ip4ProtoPort  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	ip6ProtoPort  = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService)
	ip4Port       = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	ip6Port       = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)
	linkMAC4      = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr)
	linkMAC6      = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIP6Addr)
)

// sets by setID. A pod adds elements here, never rules, so that a packet's way
// through the rules does not get longer with the number of pods.
var sets = [numSets]set{
	// Host ports on every local address, and those on one.
	ports4:     {name: "ports4", key: protoPort, data: &ip4Port},
	ports6:     {name: "ports6", key: protoPort, data: &ip6Port},
	addrPorts4: {name: "addrports4", key: ip4ProtoPort, data: &ip4Port},
	addrPorts6: {name: "addrports6", key: ip6ProtoPort, data: &ip6Port},
	// Host ports that can be reached through the host's loopback addresses.
	local4:     {name: "local4", key: protoPort},
	localAddr4: {name: "localaddr4", key: ip4ProtoPort},
	local6:     {name: "local6", key: protoPort},
	// All of the previous three, without their addresses.
	published: {name: "published", key: protoPort},
	// Local clients whose own port number is one of published: protocol, their
	// port, the server's port.
	clients: {name: "clients", key: protoPortPort, dynamic: true},
	// What a pod may send from: its port on the bridge, its MAC, its addresses.
	own4: {name: "own4", key: linkMAC4, bridge: true},
	own6: {name: "own6", key: linkMAC6, bridge: true},
}

// inetChains are the chains of our table in the family inet.
//
// A host port on a loopback address needs care. Plain DNAT of a local packet
// leaves 127.0.0.1 as its source, which the kernel routes off the host only with
// route_localnet; and with that, pods and neighbours reach services that listen
// on 127.0.0.1 only (CVE-2020-8558). We never set it. Instead output_raw gives
// such packets the bridge's address as source before connection tracking sees
// them, and input_local gives the answers their destination 127.0.0.1 back, after
// routing and after connection tracking translated them. Both are stateless. The
// one thing that a stateless rule cannot tell is a request to port P from an
// answer to a client that happens to use P as its own port; chain output_raw
// remembers such clients (set clients), and leaves answers to them alone. IPv6
// works the same way, though there is no route_localnet for it at all.
// (A connection to a host port that the pod refuses by ICMP, not by a TCP reset,
// times out, as the ICMP error's inside is not translated.)
func (c Config) inetChains() []chain {
	br := c.Bridge
	rawIn := chain{name: "prerouting_raw", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, prio: prioRaw, rule: []rule{
		// The kernel does this too, unless someone sets route_localnet for all links.
		{fmt.Sprintf("iifname %q ip daddr 127.0.0.0/8 drop", br),
			join(iifname(br), ip4, load(net, 16, 1), eq(127), verdict(expr.VerdictDrop, ""))},
		{fmt.Sprintf("iifname %q ip6 daddr ::1 drop", br),
			join(iifname(br), ip6, load(net, 24, 16), eq(loopback6...), verdict(expr.VerdictDrop, ""))},
	}}

	rawOut := chain{name: "output_raw", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, prio: prioRaw, rule: []rule{
		{`oifname "lo" meta l4proto . th sport @published update @clients { meta l4proto . th sport . th dport }`,
			join(oifname("lo"), l4proto(1), load(trans, 0, 2, 9), lookup(published),
				l4proto(1), load(trans, 0, 2, 9), load(trans, 2, 2, 10), one(&expr.Dynset{
					SrcRegKey: 1, SetName: sets[clients].name, Operation: unix.NFT_DYNSET_OP_UPDATE}))},
		{`oifname "lo" meta l4proto . th dport . th sport @clients return`,
			join(oifname("lo"), l4proto(1), load(trans, 2, 2, 9), load(trans, 0, 2, 10), lookup(clients), verdict(expr.VerdictReturn, ""))},
	}}
	localIn := chain{name: "input_local", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, prio: prioAfterNAT}
	if gw := c.Gateway4; gw.IsValid() {
		rawOut.rule = append(rawOut.rule,
			rule{fmt.Sprintf("ip saddr 127.0.0.1 ip daddr 127.0.0.0/8 meta l4proto . th dport @local4 ip saddr set %s", gw),
				join(ip4, load(net, 12, 4), eq(127, 0, 0, 1), load(net, 16, 1), eq(127),
					l4proto(1), load(trans, 2, 2, 9), lookup(local4), setAddr4(12, gw))},
			rule{fmt.Sprintf("ip saddr 127.0.0.1 ip daddr . meta l4proto . th dport @localaddr4 ip saddr set %s", gw),
				join(ip4, load(net, 12, 4), eq(127, 0, 0, 1), load(net, 16, 4, 1), l4proto(9), load(trans, 2, 2, 10),
					lookup(localAddr4), setAddr4(12, gw))})
		localIn.rule = append(localIn.rule,
			rule{fmt.Sprintf("iifname %q ct direction reply ip saddr 127.0.0.0/8 ip daddr set 127.0.0.1", br),
				join(iifname(br), ctReply, ip4, load(net, 12, 1), eq(127), setAddr4(16, netip.AddrFrom4([4]byte{127, 0, 0, 1})))})
	}
	if gw := c.Gateway6; gw.IsValid() {
		rawOut.rule = append(rawOut.rule,
			rule{fmt.Sprintf("ip6 saddr ::1 ip6 daddr ::1 meta l4proto . th dport @local6 ip6 saddr set %s", gw),
				join(ip6, load(net, 8, 16), eq(loopback6...), load(net, 24, 16), eq(loopback6...),
					l4proto(1), load(trans, 2, 2, 9), lookup(local6), setAddr6(8, gw))})
		localIn.rule = append(localIn.rule,
			rule{fmt.Sprintf("iifname %q ct direction reply ip6 saddr ::1 ip6 daddr set ::1", br),
				join(iifname(br), ctReply, ip6, load(net, 8, 16), eq(loopback6...), setAddr6(24, netip.IPv6Loopback()))})
	}

	hostPorts := chain{name: "hostports", rule: []rule{
		{"dnat ip to ip daddr . meta l4proto . th dport map @addrports4",
			join(ip4, load(net, 16, 4, 1), l4proto(9), load(trans, 2, 2, 10), mapTo(addrPorts4), dnat(unix.NFPROTO_IPV4, 9))},
		{"meta nfproto ipv4 dnat ip to meta l4proto . th dport map @ports4",
			join(ip4, l4proto(1), load(trans, 2, 2, 9), mapTo(ports4), dnat(unix.NFPROTO_IPV4, 9))},
		{"dnat ip6 to ip6 daddr . meta l4proto . th dport map @addrports6",
			join(ip6, load(net, 24, 16, 1), l4proto(2), load(trans, 2, 2, 13), mapTo(addrPorts6), dnat(unix.NFPROTO_IPV6, 2))},
		{"meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @ports6",
			join(ip6, l4proto(1), load(trans, 2, 2, 9), mapTo(ports6), dnat(unix.NFPROTO_IPV6, 2))},
	}}
	// Only what is addressed to this host is translated (CVE-2025-67499).
	toHost := rule{"fib daddr type local jump hostports",
		join(one(&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}), eqNative(unix.RTN_LOCAL), verdict(expr.VerdictJump, hostPorts.name))}
	preNAT := chain{name: "prerouting", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, prio: prioDNAT, rule: []rule{
		// From the wire, a loopback address is an attack; a port published on
		// 127.0.0.1 is for this host (whose own packets pass the output chain).
		{"ip daddr 127.0.0.0/8 return", join(ip4, load(net, 16, 1), eq(127), verdict(expr.VerdictReturn, ""))},
		{"ip6 daddr ::1 return", join(ip6, load(net, 24, 16), eq(loopback6...), verdict(expr.VerdictReturn, ""))},
		toHost,
	}}
	outNAT := chain{name: "output", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, prio: prioDNAT, rule: []rule{toHost}}

	postNAT := chain{name: "postrouting", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: prioSNAT}
	for _, s := range c.Subnets {
		from := fmt.Sprintf("%s saddr %s", familyWord(s.Addr()), s)
		if c.Masquerade {
			for _, to := range c.MasqueradeExcept {
				if to.Addr().Is4() != s.Addr().Is4() {
					continue
				}
				postNAT.rule = append(postNAT.rule, rule{
					fmt.Sprintf("%s %s daddr %s oifname != %q return", from, familyWord(to.Addr()), to, br),
					join(family(s.Addr()), inPrefix(s, saddrOffset(s.Addr())), inPrefix(to, daddrOffset(s.Addr())),
						oifnameNot(br), verdict(expr.VerdictReturn, ""))})
			}
			postNAT.rule = append(postNAT.rule, rule{
				fmt.Sprintf("%s oifname != %q masquerade", from, br),
				join(family(s.Addr()), inPrefix(s, saddrOffset(s.Addr())), oifnameNot(br), one(&expr.Masq{}))})
		}
		// A pod that was translated to a pod (itself, by its own host port, or a
		// neighbour) would get the answer past this host, from an address that it
		// never spoke to.
		postNAT.rule = append(postNAT.rule, rule{
			fmt.Sprintf("%s oifname %q ct status dnat masquerade", from, br),
			join(family(s.Addr()), inPrefix(s, saddrOffset(s.Addr())), oifname(br), ctDNATed, one(&expr.Masq{}))})
	}
	return []chain{rawIn, rawOut, localIn, hostPorts, preNAT, outNAT, postNAT}
}

// bridgeChains are the chains of our table in the family bridge: a pod sends
// only as itself. Without them a pod with CAP_NET_RAW, which Kubernetes grants by
// default, can take over its neighbours' addresses (ARP and neighbour
// discovery spoofing) or become their router (CVE-2020-10749).
//
// The ports are told by the prefix of their name: `meta ibrname` needs a module
// that not every kernel has.
func (c Config) bridgeChains() []chain {
	drop := verdict(expr.VerdictDrop, "")
	icmp6 := chain{name: "icmp6", rule: []rule{
		{"icmpv6 type nd-router-advert drop", join(icmp6Type(134), drop)},
		{"icmpv6 type nd-redirect drop", join(icmp6Type(137), drop)},
		// The advertised address; nft 1.0.7 and later call @th,64,128 `icmpv6 taddr`.
		{"icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 != @own6 drop",
			join(icmp6Type(136), linkAndMAC, load(trans, 8, 16, 14), lookupNot(own6), drop)},
		// Nobody listens to these: our bridge does not snoop. It would send each of
		// the several that a new pod begins with to all other pods.
		{"icmpv6 type mld-listener-report drop", join(icmp6Type(131), drop)},
		{"icmpv6 type mld-listener-done drop", join(icmp6Type(132), drop)},
		{"icmpv6 type mld2-listener-report drop", join(icmp6Type(143), drop)},
	}}
	pod := chain{name: "pod", rule: []rule{
		{"iifname . ether saddr . ip saddr @own4 accept",
			join(etherType(unix.ETH_P_IP), linkAndMAC, load(net, 12, 4, 14), lookup(own4), verdict(expr.VerdictAccept, ""))},
		{"meta l4proto ipv6-icmp jump icmp6",
			join(l4proto(1), eq(unix.IPPROTO_ICMPV6), verdict(expr.VerdictJump, icmp6.name))},
		{"iifname . ether saddr . ip6 saddr @own6 accept",
			join(etherType(unix.ETH_P_IPV6), linkAndMAC, load(net, 8, 16, 14), lookup(own6), verdict(expr.VerdictAccept, ""))},
		{"iifname . ether saddr . arp saddr ip @own4 accept",
			join(etherType(unix.ETH_P_ARP), linkAndMAC, load(net, 14, 4, 14), lookup(own4), verdict(expr.VerdictAccept, ""))},
		{"counter drop", join(one(&expr.Counter{}), drop)},
	}}
	pre := chain{name: "prerouting", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, prio: prioBridge, rule: []rule{
		{fmt.Sprintf(`iifname "%s*" goto pod`, c.PortPrefix),
			join(one(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}), eq([]byte(c.PortPrefix)...), verdict(expr.VerdictGoto, pod.name))},
	}}
	return []chain{icmp6, pod, pre}
}

// The rest of this file are the words that the rules above are written in. Each
// is what nft(8) compiles the same words to (nft --debug=netlink). Registers: 1
// is 16 bytes long and starts with 8; 9, 10 … are the 4 byte registers after
// that; 2 is 16 bytes and starts with 12, so 13 and 14 follow 12's first words.

const (
	link  = expr.PayloadBaseLLHeader
	net   = expr.PayloadBaseNetworkHeader
	trans = expr.PayloadBaseTransportHeader
)

var (
	loopback6 = netip.IPv6Loopback().AsSlice()

	ip4 = join(one(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}), eq(unix.NFPROTO_IPV4))
	ip6 = join(one(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}), eq(unix.NFPROTO_IPV6))

	ctReply = join(one(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}), eq(1)) // IP_CT_DIR_REPLY
	// IPS_DST_NAT, bit 5 (linux/netfilter/nf_conntrack_common.h).
	ctDNATed = join(one(&expr.Ct{Key: expr.CtKeySTATUS, Register: 1}),
		one(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(1 << 5), Xor: native(0)}),
		one(&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native(0)}))

	// linkAndMAC fills registers 1 (16 bytes) and 2 (8 bytes of it) with the start of an own4 or own6 key.
	linkAndMAC = join(one(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}), load(link, 6, 6, 2))
)

func one(e any) []any { return []any{e} }

func join(parts ...[]any) []any {
	var all []any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// load reads n bytes of the packet into a register, 1 unless told.
func load(base expr.PayloadBase, offset, n uint32, reg ...uint32) []any {
	r := uint32(1)
	if len(reg) > 0 {
		r = reg[0]
	}
	return one(&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: r, Base: base, Offset: offset, Len: n})
}

func l4proto(reg uint32) []any {
	return one(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg})
}

func eq(data ...byte) []any {
	return one(&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: bytes.Clone(data)})
}

func eqNative(v uint32) []any { return eq(native(v)...) }

func iifname(name string) []any {
	return join(one(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}), eq(ifname(name)...))
}

func oifname(name string) []any {
	return join(one(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}), eq(ifname(name)...))
}

func oifnameNot(name string) []any {
	return join(one(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}),
		one(&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: ifname(name)}))
}

func etherType(t uint16) []any {
	return join(load(link, 12, 2), eq(byte(t>>8), byte(t)))
}

func icmp6Type(typ byte) []any {
	return join(etherType(unix.ETH_P_IPV6), l4proto(1), eq(unix.IPPROTO_ICMPV6), load(trans, 0, 1), eq(typ))
}

func lookup(id setID) []any {
	return one(&expr.Lookup{SourceRegister: 1, SetName: sets[id].name})
}

func lookupNot(id setID) []any {
	return one(&expr.Lookup{SourceRegister: 1, SetName: sets[id].name, Invert: true})
}

// mapTo leaves the address in register 1 and the port behind it.
func mapTo(id setID) []any {
	return one(&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: sets[id].name})
}

func dnat(family, portReg uint32) []any {
	return one(&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: portReg})
}

func verdict(kind expr.VerdictKind, chain string) []any {
	return one(&expr.Verdict{Kind: kind, Chain: chain})
}

// setAddr4 overwrites an address in the IPv4 header, and mends the header's
// checksum (at 10) and the transport's, which covers the addresses.
func setAddr4(offset uint32, a netip.Addr) []any {
	return []any{
		&expr.Immediate{Register: 1, Data: a.AsSlice()},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: net, Offset: offset, Len: 4,
			CsumType: expr.CsumTypeInet, CsumOffset: 10, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR},
	}
}

// setAddr6 is setAddr4 for IPv6, whose header has no checksum.
func setAddr6(offset uint32, a netip.Addr) []any {
	return []any{&expr.Immediate{Register: 1, Data: a.AsSlice()}, &writeAddr6{offset: offset}}
}

// writeAddr6 writes register 1 into the IPv6 header and mends the transport's
// checksum: an expr.Payload with CsumTypeNone and CsumFlags, which
// google/nftables 0.3 cannot encode (it leaves the flags out).
type writeAddr6 struct{ offset uint32 }

func family(a netip.Addr) []any {
	if a.Is4() {
		return ip4
	}
	return ip6
}

func familyWord(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}

func saddrOffset(a netip.Addr) uint32 {
	if a.Is4() {
		return 12
	}
	return 8
}

func daddrOffset(a netip.Addr) uint32 {
	if a.Is4() {
		return 16
	}
	return 24
}

// inPrefix compares the address at offset with p; like nft(8), it loads only
// whole bytes where the prefix ends on one.
func inPrefix(p netip.Prefix, offset uint32) []any {
	p = p.Masked()
	a := p.Addr().AsSlice()
	if n := uint32(p.Bits() / 8); p.Bits()%8 == 0 && n > 0 {
		return join(load(net, offset, n), eq(a[:n]...))
	}
	mask := make([]byte, len(a))
	for i := range p.Bits() {
		mask[i/8] |= 1 << (7 - i%8)
	}
	return join(load(net, offset, uint32(len(a))),
		one(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(a)), Mask: mask, Xor: make([]byte, len(a))}),
		eq(a...))
}

// ifname is a link's name as nft compares it: 16 bytes, so that the comparison is
// not one of prefixes.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
