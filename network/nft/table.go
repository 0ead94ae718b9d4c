package nft

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network/netns"
	"github.com/crisp-cri/crisp/network/nlbatch"
)

// Table is our two tables: in memory, and in the kernel of one network namespace.
// It is safe for concurrent use.
type Table struct {
	ns   *os.File // nil: the process's
	conn *nlbatch.Conn

	mu   sync.Mutex     // also held while the kernel is changed: changes are made in the order of memory
	cfg  Config         // the zero value until Configure: nothing is written to the kernel
	pods map[string]Pod // by link
	// elems counts who needs an element: two pods that publish one port number on
	// two addresses share some.
	elems [numSets]map[[2]string]int
	// live: the kernel has our rules as far as we know.
	live bool
}

// Open opens the connection to the kernel in ns (nil: the process's network
// namespace). Nothing is changed before the first Replace.
//
// Needs: CAP_NET_ADMIN in ns, later too.
func Open(ns *os.File) (*Table, error) {
	t := &Table{ns: ns, pods: map[string]Pod{}}
	t.recountLocked()
	err := netns.Do(ns, func() (err error) {
		t.conn, err = nlbatch.Dial(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot open nftables: %w", err)
	}
	return t, nil
}

// Close closes the connection; the rules stay.
func (t *Table) Close() error { return t.conn.Close() }

// recountLocked makes elems from pods.
func (t *Table) recountLocked() {
	for i := range t.elems {
		t.elems[i] = map[[2]string]int{}
	}
	for _, p := range t.pods {
		t.countLocked(p.elements(t.cfg), +1)
	}
}

// Configure sets the rules, and writes everything to the kernel.
func (t *Table) Configure(cfg Config) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cfg = cfg
	t.recountLocked()
	return t.rebuildLocked()
}

// Put makes memory cover pods; the kernel follows with the next Configure, Rebuild
// or Add.
func (t *Table) Put(pods ...Pod) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range pods {
		t.pods[p.Link] = p
	}
	t.recountLocked()
	t.live = false
}

// Rebuild writes what is in memory to the kernel.
func (t *Table) Rebuild() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rebuildLocked()
}

// rebuildLocked deletes and makes the tables in one transaction: no packet sees a
// state in between. On an error the kernel keeps what it had.
func (t *Table) rebuildLocked() error {
	if t.cfg.Table == "" {
		return nil
	}
	msgs := t.cfg.dropTables()
	create, err := t.cfg.create()
	if err != nil {
		return fmt.Errorf("cannot write nftables table %q: %w", t.cfg.Table, err)
	}
	msgs = append(msgs, create...)
	msgs = append(msgs, t.cfg.elements(unix.NFT_MSG_NEWSETELEM, t.allLocked())...)
	if err := t.conn.Do(batch(msgs)...); err != nil {
		t.live = false
		if t.cfg.AntiSpoof && errors.Is(err, unix.EAFNOSUPPORT) {
			err = fmt.Errorf("%w; this kernel has no nftables for bridges (CONFIG_NF_TABLES_BRIDGE), which the check of pods' source addresses needs", err)
		}
		return fmt.Errorf("cannot write nftables table %q: %w", t.cfg.Table, err)
	}
	t.live = true
	if !t.cfg.AntiSpoof {
		return t.dropBridgeLocked()
	}
	return nil
}

// dropBridgeLocked deletes the bridge table that a former configuration left.
func (t *Table) dropBridgeLocked() error {
	err := t.conn.Do(batch([]nlbatch.Message{t.cfg.table(unix.NFT_MSG_DELTABLE, unix.NFPROTO_BRIDGE)})...)
	for _, none := range []error{unix.ENOENT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		if errors.Is(err, none) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("cannot delete nftables table bridge %q: %w", t.cfg.Table, err)
	}
	return nil
}

// allLocked is every element, by set.
func (t *Table) allLocked() []element {
	var elems []element
	for id := range t.elems {
		for kv := range t.elems[id] {
			elems = append(elems, element{setID(id), kv[0], kv[1]})
		}
	}
	slices.SortFunc(elems, compareElements)
	return elems
}

func compareElements(a, b element) int {
	return cmp.Or(cmp.Compare(a.set, b.set), cmp.Compare(a.key, b.key), cmp.Compare(a.val, b.val))
}

// Add makes the rules cover p. It is idempotent. On an error they do not, or the
// next rebuild makes sure of it.
func (t *Table) Add(p Pod) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, have := t.pods[p.Link]; have {
		if t.live {
			return nil
		}
		return t.rebuildLocked()
	}
	t.pods[p.Link] = p
	err := t.changeLocked(unix.NFT_MSG_NEWSETELEM, t.countLocked(p.elements(t.cfg), +1))
	if err != nil {
		delete(t.pods, p.Link)
		t.countLocked(p.elements(t.cfg), -1)
	}
	return err
}

// Remove makes the rules forget the pod with that link. It is idempotent. On an
// error the kernel may still have its rules; memory has not, so that the next
// rebuild removes them.
func (t *Table) Remove(link string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, have := t.pods[link]
	if !have {
		return nil
	}
	delete(t.pods, link)
	return t.changeLocked(unix.NFT_MSG_DELSETELEM, t.countLocked(p.elements(t.cfg), -1))
}

// countLocked changes the counts and returns the elements that came or went.
func (t *Table) countLocked(elems []element, by int) []element {
	var changed []element
	for _, e := range elems {
		kv := [2]string{e.key, e.val}
		was := t.elems[e.set][kv]
		now := max(was+by, 0)
		switch {
		case now == 0:
			delete(t.elems[e.set], kv)
		default:
			t.elems[e.set][kv] = now
		}
		if (was == 0) != (now == 0) {
			changed = append(changed, e)
		}
	}
	slices.SortFunc(changed, compareElements)
	return changed
}

// changeLocked sends a change of elements. If the kernel's copy is not what we
// think (someone deleted it a moment ago), everything is written anew, with the change.
func (t *Table) changeLocked(typ uint16, elems []element) error {
	if t.cfg.Table == "" || (len(elems) == 0 && t.live) {
		return nil
	}
	if !t.live {
		return t.rebuildLocked()
	}
	if err := t.conn.Do(batch(t.cfg.elements(typ, elems))...); err != nil {
		return t.rebuildLocked()
	}
	return nil
}

// Delete forgets everything but the connection, and takes the tables called name
// out of the kernel.
func (t *Table) Delete(name string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cfg = Config{Table: name}
	defer func() { t.cfg = Config{} }()
	t.pods, t.live = map[string]Pod{}, false
	t.recountLocked()
	if err := t.conn.Do(batch(t.cfg.dropTables())...); err != nil {
		return fmt.Errorf("cannot delete nftables table %q: %w", name, err)
	}
	return t.dropBridgeLocked()
}
