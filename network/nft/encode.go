package nft

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network/nlbatch"
)

// maxElements per message: the list is one attribute, at most 64 KiB long, and
// the longest element (a key and data in own6 or addrports6) takes about 80 bytes.
const maxElements = 500

// element of a set, or of a map (val not empty).
type element struct {
	set      setID
	key, val string // bytes; strings, so that they compare
}

// tables and their families, in the order of creation.
func (c Config) families() []uint8 {
	if c.AntiSpoof {
		return []uint8{unix.NFPROTO_INET, unix.NFPROTO_BRIDGE}
	}
	return []uint8{unix.NFPROTO_INET}
}

// batch puts messages into a transaction.
func batch(msgs []nlbatch.Message) []nlbatch.Message {
	all := make([]nlbatch.Message, 0, len(msgs)+2)
	all = append(all, nlbatch.Message{Step: "nftables transaction", Type: unix.NFNL_MSG_BATCH_BEGIN, Body: nlbatch.NFGen(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)})
	all = append(all, msgs...)
	return append(all, nlbatch.Message{Step: "nftables transaction", Type: unix.NFNL_MSG_BATCH_END, Body: nlbatch.NFGen(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)})
}

func message(typ uint16, flags uint16, family uint8, step string, attrs func(nlbatch.Body) nlbatch.Body) nlbatch.Message {
	return nlbatch.Message{Step: step, Type: unix.NFNL_SUBSYS_NFTABLES<<8 | typ, Flags: flags, Body: attrs(nlbatch.NFGen(family, 0))}
}

// dropTables deletes the tables of both families, also those that do not exist:
// adding one that is there has no effect, and there is no "delete if there"
// before Linux 6.3.
func (c Config) dropTables() []nlbatch.Message {
	var msgs []nlbatch.Message
	for _, f := range []uint8{unix.NFPROTO_INET, unix.NFPROTO_BRIDGE} {
		if f == unix.NFPROTO_BRIDGE && !c.AntiSpoof {
			// The kernel may not have that family at all.
			continue
		}
		msgs = append(msgs, c.table(unix.NFT_MSG_NEWTABLE, f), c.table(unix.NFT_MSG_DELTABLE, f))
	}
	return msgs
}

func (c Config) table(typ uint16, family uint8) nlbatch.Message {
	var flags uint16
	if typ == unix.NFT_MSG_NEWTABLE {
		flags = unix.NLM_F_CREATE
	}
	return message(typ, flags, family, fmt.Sprintf("table %s %s", familyName(family), c.Table),
		func(b nlbatch.Body) nlbatch.Body { return b.String(unix.NFTA_TABLE_NAME, c.Table) })
}

// create is everything but the elements.
func (c Config) create() ([]nlbatch.Message, error) {
	var msgs []nlbatch.Message
	for _, family := range c.families() {
		msgs = append(msgs, c.table(unix.NFT_MSG_NEWTABLE, family))
		for id := range sets {
			if sets[id].bridge == (family == unix.NFPROTO_BRIDGE) {
				msgs = append(msgs, c.newSet(family, setID(id)))
			}
		}
		chains := c.chains(family)
		for _, ch := range chains {
			msgs = append(msgs, c.newChain(family, ch))
		}
		for _, ch := range chains {
			for _, r := range ch.rule {
				m, err := c.newRule(family, ch.name, r)
				if err != nil {
					return nil, err
				}
				msgs = append(msgs, m)
			}
		}
	}
	return msgs, nil
}

func (c Config) chains(family uint8) []chain {
	if family == unix.NFPROTO_BRIDGE {
		return c.bridgeChains()
	}
	return c.inetChains()
}

func (c Config) newSet(family uint8, id setID) nlbatch.Message {
	s := sets[id]
	return message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, family, "set "+s.name, func(b nlbatch.Body) nlbatch.Body {
		var flags uint32
		if s.data != nil {
			flags |= unix.NFT_SET_MAP
		}
		if s.dynamic {
			flags |= unix.NFT_SET_EVAL | unix.NFT_SET_TIMEOUT
		}
		b = b.String(unix.NFTA_SET_TABLE, c.Table).String(unix.NFTA_SET_NAME, s.name).
			BE32(unix.NFTA_SET_FLAGS, flags).
			BE32(unix.NFTA_SET_KEY_TYPE, s.key.GetNFTMagic()).BE32(unix.NFTA_SET_KEY_LEN, s.key.Bytes).
			BE32(unix.NFTA_SET_ID, uint32(id)+1)
		if s.data != nil {
			b = b.BE32(unix.NFTA_SET_DATA_TYPE, s.data.GetNFTMagic()).BE32(unix.NFTA_SET_DATA_LEN, s.data.Bytes)
		}
		if s.dynamic {
			b = b.Attr(unix.NFTA_SET_TIMEOUT, binaryutil.BigEndian.PutUint64(uint64(clientsTimeout.Milliseconds())))
			b = b.Nest(unix.NFTA_SET_DESC|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
				return b.BE32(unix.NFTA_SET_DESC_SIZE, clientsSize)
			})
		}
		// Not for the kernel: nft(8) prints keys in the right order of bytes with it.
		ud := userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, 2)
		return b.Attr(unix.NFTA_SET_USERDATA, ud)
	})
}

func (c Config) newChain(family uint8, ch chain) nlbatch.Message {
	return message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, family, "chain "+ch.name, func(b nlbatch.Body) nlbatch.Body {
		b = b.String(unix.NFTA_CHAIN_TABLE, c.Table).String(unix.NFTA_CHAIN_NAME, ch.name)
		if ch.typ == "" {
			return b
		}
		return b.Nest(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
			return b.BE32(unix.NFTA_HOOK_HOOKNUM, uint32(*ch.hook)).BE32(unix.NFTA_HOOK_PRIORITY, uint32(ch.prio))
		}).BE32(unix.NFTA_CHAIN_POLICY, uint32(nftables.ChainPolicyAccept)).String(unix.NFTA_CHAIN_TYPE, string(ch.typ))
	})
}

func (c Config) newRule(family uint8, chain string, r rule) (nlbatch.Message, error) {
	var failed error
	m := message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, family, fmt.Sprintf("rule %q", r.cli), func(b nlbatch.Body) nlbatch.Body {
		return b.String(unix.NFTA_RULE_TABLE, c.Table).String(unix.NFTA_RULE_CHAIN, chain).
			Nest(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
				for _, e := range r.exprs {
					enc, err := marshal(family, e)
					if err != nil {
						failed = fmt.Errorf("rule %q: %w", r.cli, err)
						return b
					}
					b = b.Attr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, enc)
				}
				return b
			})
	})
	return m, failed
}

func marshal(family uint8, e any) ([]byte, error) {
	switch e := e.(type) {
	case *writeAddr6:
		return nlbatch.Body(nil).String(unix.NFTA_EXPR_NAME, "payload").
			Nest(unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
				return b.BE32(unix.NFTA_PAYLOAD_SREG, 1).BE32(unix.NFTA_PAYLOAD_BASE, uint32(net)).
					BE32(unix.NFTA_PAYLOAD_OFFSET, e.offset).BE32(unix.NFTA_PAYLOAD_LEN, 16).
					BE32(unix.NFTA_PAYLOAD_CSUM_TYPE, unix.NFT_PAYLOAD_CSUM_NONE).BE32(unix.NFTA_PAYLOAD_CSUM_OFFSET, 0).
					BE32(unix.NFTA_PAYLOAD_CSUM_FLAGS, unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR)
			}), nil
	case expr.Any:
		return expr.Marshal(family, e)
	default:
		return nil, fmt.Errorf("unknown expression %T", e)
	}
}

// elements is a list of messages that add (NFT_MSG_NEWSETELEM) or delete
// (NFT_MSG_DELSETELEM) elems, those of a set next to each other.
func (c Config) elements(typ uint16, elems []element) []nlbatch.Message {
	var msgs []nlbatch.Message
	for len(elems) > 0 {
		n := 1
		for n < len(elems) && n < maxElements && elems[n].set == elems[0].set {
			n++
		}
		msgs = append(msgs, c.setElements(typ, elems[:n]))
		elems = elems[n:]
	}
	return msgs
}

func (c Config) setElements(typ uint16, elems []element) nlbatch.Message {
	s := sets[elems[0].set]
	family, flags := uint8(unix.NFPROTO_INET), uint16(0)
	if s.bridge {
		family = unix.NFPROTO_BRIDGE
	}
	if typ == unix.NFT_MSG_NEWSETELEM {
		flags = unix.NLM_F_CREATE
	}
	return message(typ, flags, family, "elements of "+s.name, func(b nlbatch.Body) nlbatch.Body {
		b = b.String(unix.NFTA_SET_ELEM_LIST_TABLE, c.Table).String(unix.NFTA_SET_ELEM_LIST_SET, s.name)
		return b.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
			for _, e := range elems {
				b = b.Nest(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
					b = b.Nest(unix.NFTA_SET_ELEM_KEY|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
						return b.Attr(unix.NFTA_DATA_VALUE, []byte(e.key))
					})
					if e.val != "" {
						b = b.Nest(unix.NFTA_SET_ELEM_DATA|unix.NLA_F_NESTED, func(b nlbatch.Body) nlbatch.Body {
							return b.Attr(unix.NFTA_DATA_VALUE, []byte(e.val))
						})
					}
					return b
				})
			}
			return b
		})
	})
}

func familyName(f uint8) string {
	if f == unix.NFPROTO_BRIDGE {
		return "bridge"
	}
	return "inet"
}
