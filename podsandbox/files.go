package podsandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/crisp-cri/crisp/runtime/selinux"
)

// Names of the files that a pod's containers bind-mount.
const (
	resolvConfName = "resolv.conf"
	hostsName      = "hosts"
	hostnameName   = "hostname"
)

// maxHostFile bounds what is copied of a file of the host, in bytes.
const maxHostFile = 1 << 20

// writeFiles makes resolv.conf, hosts and hostname in dir. With the host's network they are the host's.
func writeFiles(dir, host string, c *PodConfig, ips []netip.Addr) error {
	hostname := c.Hostname
	if c.Network == NamespaceNode || hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return err
		}
	}
	resolv := resolvConf(c.DNS)
	if resolv == nil {
		var err error
		if resolv, err = hostFile(filepath.Join(host, resolvConfName)); err != nil {
			return err
		}
	}
	hosts := hostsFile(hostname, ips)
	if c.Network == NamespaceNode {
		var err error
		if hosts, err = hostFile(filepath.Join(host, hostsName)); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		name string
		b    []byte
	}{{resolvConfName, resolv}, {hostsName, hosts}, {hostnameName, []byte(hostname + "\n")}} {
		path := filepath.Join(dir, f.name)
		if err := errors.Join(createFile(path, f.b, 0o644), selinux.SetFile(path, c.Label)); err != nil {
			return err
		}
	}
	return nil
}

// replaceHosts writes the hosts file of a pod with its own network again, for its addresses.
func replaceHosts(dir string, c *PodConfig, ips []netip.Addr) error {
	hostname := c.Hostname
	if hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return err
		}
	}
	path := filepath.Join(dir, hostsName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(createFile(path, hostsFile(hostname, ips), 0o644), selinux.SetFile(path, c.Label))
}

// resolvConf is resolv.conf(5), nil when c says nothing.
func resolvConf(c DNSConfig) []byte {
	if len(c.Servers)+len(c.Searches)+len(c.Options) == 0 {
		return nil
	}
	var b strings.Builder
	if len(c.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.Searches, " "))
	}
	for _, s := range c.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(c.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(c.Options, " "))
	}
	return []byte(b.String())
}

// hostsFile is hosts(5) of a pod with its own network. The kubelet mounts its own over it.
func hostsFile(hostname string, ips []netip.Addr) []byte {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n")
	for _, ip := range ips {
		fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
	}
	return []byte(b.String())
}

// hostFile reads a file of the host; one that is not there is empty.
func hostFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	b, err := io.ReadAll(io.LimitReader(f, maxHostFile+1))
	if err == nil && len(b) > maxHostFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxHostFile)
	}
	return b, err
}

// validDNS refuses what would break out of its line.
func validDNS(c DNSConfig) error {
	for _, l := range [][]string{c.Servers, c.Searches, c.Options} {
		for _, s := range l {
			if s == "" || strings.ContainsAny(s, " \t\r\n\x00#;") {
				return fmt.Errorf("%w: DNS entry %q", ErrInvalid, s)
			}
		}
	}
	return nil
}
