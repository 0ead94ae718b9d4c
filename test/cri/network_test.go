package cri

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func withPorts(ports ...*runtimeapi.PortMapping) editPod {
	return func(c *runtimeapi.PodSandboxConfig) { c.PortMappings = ports }
}

// freePort is a port of the host that nothing uses: the kernel gave it out and took it back.
func freePort(t *testing.T) int32 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

// hostIP is an address of the host that is not loopback, "" without one.
func hostIP(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() {
			return p.Addr().String()
		}
	}
	return ""
}

// get asks an HTTP server of a pod, from the host.
func get(t *testing.T, address string) (string, error) {
	t.Helper()
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + address + "/hostname")
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	return strings.TrimSpace(string(body)), err
}

func named(name string) editPod {
	return func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name, c.Hostname = name, name }
}

func TestPodsReachEachOtherAndTheHost(t *testing.T) {
	w := need(t)
	a, b := w.pod(t, named("pod-a")), w.pod(t, named("pod-b"))
	server := b.run([]string{"http", ":8080"})
	server.says("listening")
	client := a.run([]string{"sleep"})
	for name, ip := range map[string]string{"IPv4": b.ip(), "IPv6": "[" + b.v6() + "]"} {
		t.Run("pod to pod, "+name, func(t *testing.T) {
			if got := client.exec("get", "http://"+ip+":8080/hostname"); got != "pod-b\n" {
				t.Errorf("got %q", got)
			}
			// No translation in between: the server sees the pod's own address.
			got := client.exec("get", "http://"+ip+":8080/")
			want := a.ip()
			if name == "IPv6" {
				want = a.v6()
			}
			if !strings.Contains(got, "to "+want) && !strings.Contains(got, "to ["+want) {
				t.Errorf("got %q, want it from %s", got, want)
			}
		})
		t.Run("host to pod, "+name, func(t *testing.T) {
			if got, err := get(t, ip+":8080"); err != nil || got != "pod-b" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	t.Run("pod to host", func(t *testing.T) {
		host := hostIP(t)
		if host == "" {
			t.Skip("this host has no address but loopback")
		}
		l, err := net.Listen("tcp4", host+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go serveEcho(l) // ends with l
		if got := client.exec("dial", "tcp4", l.Addr().String(), "hello"); got != "hello\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("gateway", func(t *testing.T) {
		p := netip.MustParseAddr(a.ip()).As4()
		l, err := net.Listen("tcp4", fmt.Sprintf("%d.%d.%d.1:0", p[0], p[1], p[2]))
		if err != nil {
			t.Fatalf("the bridge has not the range's first address: %v", err)
		}
		defer l.Close()
		go serveEcho(l) // ends with l
		if got := client.exec("dial", "tcp4", l.Addr().String(), "hello"); got != "hello\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("loopback is the pod's own", func(t *testing.T) {
		got := client.exec("addr")
		if !strings.Contains(got, "lo up|loopback|running") || !strings.Contains(got, "127.0.0.1/8 ::1/128") {
			t.Errorf("got %q", got)
		}
		if !strings.Contains(got, "eth0 up|broadcast") || !strings.Contains(got, a.ip()+"/") || !strings.Contains(got, a.v6()+"/") {
			t.Errorf("got %q, want eth0 with %s and %s", got, a.ip(), a.v6())
		}
	})
	// SEC-111
	t.Run("the host's loopback is out of reach", func(t *testing.T) {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		client.fails("dial", "tcp4", l.Addr().String(), "x")
	})
}

func serveEcho(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { // ends with its connection
			defer c.Close()
			_, _ = io.Copy(c, c) // the test looks at what comes back
		}()
	}
}

func TestHostPortsOfTCP(t *testing.T) {
	w := need(t)
	port, bound, none := freePort(t), freePort(t), freePort(t)
	p := w.pod(t, named("published"), withPorts(
		&runtimeapi.PortMapping{ContainerPort: 8080, HostPort: port},
		&runtimeapi.PortMapping{ContainerPort: 8081, HostPort: bound, HostIp: "127.0.0.1"},
		&runtimeapi.PortMapping{ContainerPort: none}, // CRI 0.33: host_port 0 publishes nothing
	))
	p.run([]string{"http", ":8080"}).says("listening")
	p.run([]string{"http", ":8081"}).says("listening")
	other := w.pod(t, named("other"))
	client := other.run([]string{"sleep"})

	reach := func(t *testing.T, address string) {
		t.Helper()
		if got, err := get(t, address); err != nil || got != "published" {
			t.Errorf("%s: got %q, %v", address, got, err)
		}
	}
	t.Run("from the host, by localhost", func(t *testing.T) {
		reach(t, fmt.Sprintf("127.0.0.1:%d", port))
		reach(t, fmt.Sprintf("127.0.0.1:%d", bound))
	})
	t.Run("from the host, by IPv6 localhost", func(t *testing.T) { reach(t, fmt.Sprintf("[::1]:%d", port)) })
	host := hostIP(t)
	t.Run("from the host, by its address", func(t *testing.T) {
		if host == "" {
			t.Skip("this host has no address but loopback")
		}
		reach(t, fmt.Sprintf("%s:%d", host, port))
		if got, err := get(t, fmt.Sprintf("%s:%d", host, bound)); err == nil {
			t.Errorf("a port of 127.0.0.1 answers at %s: %q", host, got)
		}
	})
	t.Run("from another pod", func(t *testing.T) {
		if host == "" {
			t.Skip("this host has no address but loopback")
		}
		if got := client.exec("get", fmt.Sprintf("http://%s:%d/hostname", host, port)); got != "published\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("from the pod itself (hairpin)", func(t *testing.T) {
		if host == "" {
			t.Skip("this host has no address but loopback")
		}
		if got := p.run([]string{"sleep"}).exec("get", fmt.Sprintf("http://%s:%d/hostname", host, port)); got != "published\n" {
			t.Errorf("got %q", got)
		}
	})
	// SEC-112: only local destinations.
	t.Run("the same port of another pod is its own", func(t *testing.T) {
		third := w.pod(t, named("third"))
		third.run([]string{"http", fmt.Sprintf(":%d", port)}).says("listening")
		if got := client.exec("get", fmt.Sprintf("http://%s:%d/hostname", third.ip(), port)); got != "third\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("a taken port is refused", func(t *testing.T) {
		cfg := w.podConfig("taken")
		withPorts(&runtimeapi.PortMapping{ContainerPort: 1, HostPort: port})(cfg)
		w.leavesNothing(t, func() {
			_, err := w.rt.RunPodSandbox(t.Context(), cfg, "")
			if err == nil || !strings.Contains(err.Error(), fmt.Sprint(port)) {
				t.Errorf("got %v, want an error that names port %d", err, port)
			}
		})
	})
	t.Run("gone with the pod", func(t *testing.T) {
		if err := w.rt.StopPodSandbox(t.Context(), p.id); err != nil {
			t.Fatal(err)
		}
		if got, err := get(t, fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			t.Errorf("it still answers: %q", got)
		}
	})
}

func TestHostPortsOfUDP(t *testing.T) {
	w := need(t)
	port := freePort(t)
	p := w.pod(t, withPorts(&runtimeapi.PortMapping{Protocol: runtimeapi.Protocol_UDP, ContainerPort: 5353, HostPort: port}))
	p.run([]string{"listen", "udp", ":5353"}).says("listening")
	addresses := []string{fmt.Sprintf("127.0.0.1:%d", port)}
	if host := hostIP(t); host != "" {
		addresses = append(addresses, fmt.Sprintf("%s:%d", host, port))
	}
	for _, address := range addresses {
		c, err := net.Dial("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		if err != nil || string(buf[:n]) != "hello" {
			t.Errorf("%s: got %q, %v", address, buf[:n], err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAddressesAreGivenBack(t *testing.T) {
	w := need(t)
	seen := map[string]bool{}
	for range 3 {
		p := w.pod(t)
		ip := p.ip()
		if seen[ip] {
			t.Errorf("%s was given out again at once: a peer may still remember it", ip)
		}
		seen[ip] = true
		p.remove()
	}
}

func TestNoTwoPodsHaveOneAddress(t *testing.T) {
	w := need(t)
	seen := map[string]bool{}
	for range 5 {
		p := w.pod(t)
		for _, ip := range []string{p.ip(), p.v6()} {
			if seen[ip] {
				t.Errorf("%s twice", ip)
			}
			seen[ip] = true
		}
	}
}

func TestExhaustedRangeSaysSoWithNumbers(t *testing.T) {
	need(t)
	w := own(t, "--set", `network.subnets=["10.63.255.0/29"]`) // the last --set wins; five addresses for pods
	var pods []*pod
	var err error
	for range 8 {
		cfg := w.podConfig("p")
		var id string
		if id, err = w.rt.RunPodSandbox(t.Context(), cfg, ""); err != nil {
			break
		}
		p := w.adopt(t, id, cfg)
		t.Cleanup(p.remove)
		pods = append(pods, p)
	}
	if err == nil {
		t.Fatal("eight pods got an address of a /29")
	}
	if len(pods) < 4 {
		t.Errorf("only %d pods fit into a /29: %v", len(pods), err)
	}
	for _, want := range []string{"10.63.255.0/29", fmt.Sprint(len(pods))} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %q, want %q in it", err, want)
		}
	}
	pods[0].remove()
	if again := w.pod(t); again.ip() != "" && len(pods) > 0 {
		again.output([]string{"true"})
	}
}

// SEC-115
func TestDeletedTableIsBuiltAgain(t *testing.T) {
	need(t)
	w := own(t)
	port := freePort(t)
	p := w.pod(t, named("published"), withPorts(&runtimeapi.PortMapping{ContainerPort: 8080, HostPort: port}))
	p.run([]string{"http", ":8080"}).says("listening")
	address := fmt.Sprintf("127.0.0.1:%d", port)
	if got, err := get(t, address); err != nil || got != "published" {
		t.Fatalf("got %q, %v", got, err)
	}
	for _, family := range []string{"inet", "bridge"} {
		out, err := exec.Command("nft", "delete", "table", family, w.Table).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "No such file") {
			t.Fatalf("%v: %s", err, out)
		}
	}
	eventually(t, "the port answers again", func() bool {
		got, err := get(t, address)
		return err == nil && got == "published"
	})
}

// SEC-110
func TestPodsCanNotTakeOverAddressesOfOthers(t *testing.T) {
	w := need(t)
	p := w.pod(t)
	for _, file := range []string{"/proc/sys/net/ipv6/conf/" + w.Bridge + "/accept_ra"} {
		if got := strings.TrimSpace(readFile(t, file)); got != "0" {
			t.Errorf("%s: got %s, want 0", file, got)
		}
	}
	c := p.run([]string{"sleep"})
	if got := strings.TrimSpace(c.exec("cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra")); got != "0" {
		t.Errorf("eth0's accept_ra: got %s, want 0", got)
	}
	if got := strings.TrimSpace(readFile(t, "/proc/sys/net/ipv4/conf/"+w.Bridge+"/route_localnet")); got != "0" {
		t.Errorf("route_localnet of the bridge: got %s, want 0 (CVE-2020-8558)", got)
	}
}

func TestBadPortMappingIsNamed(t *testing.T) {
	w := need(t)
	cfg := w.podConfig("p")
	withPorts(&runtimeapi.PortMapping{ContainerPort: 80, HostPort: -4})(cfg)
	_, err := w.rt.RunPodSandbox(t.Context(), cfg, "")
	wantCode(t, err, codes.InvalidArgument, "-4")
}

// The kubelet passes a pod's annotations on; the embedded network limits it on the host, where the pod cannot
// reach it. (Package bridge sends traffic through.)
func TestBandwidthAnnotations(t *testing.T) {
	w := need(t)
	limited := func(c *runtimeapi.PodSandboxConfig) {
		c.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "20M", "kubernetes.io/egress-bandwidth": "10M"}
	}
	p := w.pod(t, limited)
	buckets := func() string {
		out, err := exec.Command("tc", "qdisc", "show").CombinedOutput()
		if err != nil {
			t.Fatalf("tc: %v\n%s", err, out)
		}
		var l []string
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, " tbf ") && strings.Contains(line, w.LinkPrefixes()[0][2:]) {
				l = append(l, line)
			}
		}
		return strings.Join(l, "")
	}
	for _, rate := range []string{"rate 20Mbit", "rate 10Mbit"} {
		if got := buckets(); !strings.Contains(got, rate) {
			t.Errorf("got\n%s\nwant %s", got, rate)
		}
	}
	p.run([]string{"http", ":8080"}).says("listening")
	if got, err := get(t, p.ip()+":8080"); err != nil || got != p.cfg.Hostname {
		t.Errorf("got %q, %v", got, err)
	}
	p.remove()
	if got := buckets(); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
	cfg := w.podConfig("p")
	cfg.Annotations = map[string]string{"kubernetes.io/egress-bandwidth": "fast"}
	_, err := w.rt.RunPodSandbox(t.Context(), cfg, "")
	wantCode(t, err, codes.InvalidArgument, "kubernetes.io/egress-bandwidth", "fast")
}
