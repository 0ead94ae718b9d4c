package registry

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// hostsFileName is the file of a registry's directory, in containerd's format
// (containerd docs/hosts.md).
const hostsFileName = "hosts.toml"

// maxConfigFile bounds hosts.toml and certificate files, in bytes.
const maxConfigFile = 1 << 20

// capability is what an endpoint may be used for.
type capability uint8

const (
	canPull    capability = 1 << iota // fetch manifests by digest, and blobs
	canResolve                        // fetch manifests by tag
)

// A host is one endpoint as configured: where it is and how to talk to it.
type host struct {
	scheme string // "https", "http", or "" for a loopback registry: https, and http if it does not speak TLS
	addr   string // host[:port]
	prefix string // API root: "/v2", or the URL's own path with override_path

	caps        capability
	header      http.Header   // sent to this host only
	tls         *tls.Config   // nil: the system's roots
	dialTimeout time.Duration // 0: the client's default
	isRegistry  bool          // this is the registry of the reference itself, not a mirror
}

// hostTable is one host's keys in a hosts.toml.
type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`     // string or []string
	Client       any            `toml:"client"` // string, []string or [][2]string
	SkipVerify   bool           `toml:"skip_verify"`
	Header       map[string]any `toml:"header"` // string or []string each
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// hostsFile is a whole hosts.toml.
type hostsFile struct {
	Server string `toml:"server"`
	hostTable
	Host map[string]hostTable `toml:"host"`
}

// hostsFor returns the endpoints of registry (the domain of a reference, such
// as "docker.io" or "localhost:5000"), in the order to try them. configDir is the
// certs.d directory; "" means no configuration.
//
// The first of these directories that exists counts, alone: "<host>_<port>_",
// "<host>:<port>", "_default".
func hostsFor(configDir, registry string) ([]host, error) {
	for _, dir := range hostDirs(configDir, registry) {
		if _, err := os.Stat(dir.path); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, fmt.Errorf("registry configuration: %w", err)
		}
		file := filepath.Join(dir.path, hostsFileName)
		text, err := readConfig(file)
		if errors.Is(err, fs.ErrNotExist) {
			return dockerCertDir(dir.path, registry)
		}
		if err != nil {
			return nil, fmt.Errorf("registry configuration: %w", err)
		}
		hosts, err := parseHosts(text, dir.path, registry)
		if err != nil {
			return nil, fmt.Errorf("registry configuration %s: %w", file, err)
		}
		if dir.isDefault {
			// _default's server stands for any registry; it is the reference's
			// own only where it has the same address.
			for i := range hosts {
				hosts[i].isRegistry = hosts[i].addr == registryAddr(registry)
			}
		}
		return hosts, nil
	}
	return []host{registryHost(registry)}, nil
}

type hostDir struct {
	path      string
	isDefault bool
}

func hostDirs(configDir, registry string) []hostDir {
	if configDir == "" {
		return nil
	}
	var dirs []hostDir
	if name, port, found := cutPort(registry); found {
		dirs = append(dirs, hostDir{path: filepath.Join(configDir, name+"_"+port+"_")})
	}
	return append(dirs,
		hostDir{path: filepath.Join(configDir, registry)},
		hostDir{path: filepath.Join(configDir, "_default"), isDefault: true})
}

// cutPort parts "host:port". An IPv6 address keeps its brackets.
func cutPort(addr string) (name, port string, found bool) {
	i := strings.LastIndexByte(addr, ':')
	if i < 0 || strings.HasSuffix(addr, "]") {
		return addr, "", false
	}
	return addr[:i], addr[i+1:], true
}

// registryAddr is the address behind a registry's name: docker.io's API lives elsewhere.
func registryAddr(registry string) string {
	if registry == "docker.io" {
		return "registry-1.docker.io"
	}
	return registry
}

// registryHost is the endpoint of a registry that nothing is configured for.
func registryHost(registry string) host {
	h := host{scheme: "https", addr: registryAddr(registry), prefix: "/v2", caps: canPull | canResolve, isRegistry: true}
	if isLoopback(h.addr) {
		h.scheme = ""
	}
	return h
}

// isLoopback reports whether addr (host[:port]) can only be this machine:
// localhost, 127.0.0.0/8, ::1.
func isLoopback(addr string) bool {
	name, _, _ := cutPort(addr)
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	if name == "localhost" {
		return true
	}
	ip := net.ParseIP(name)
	return ip != nil && ip.IsLoopback()
}

// parseHosts compiles a hosts.toml. dir is its directory: relative certificate
// paths start there. Errors name the key.
func parseHosts(text []byte, dir, registry string) ([]host, error) {
	var file hostsFile
	decoder := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := decoder.Decode(&file); err != nil {
		return nil, describeTOML(err)
	}
	order, err := hostOrder(text)
	if err != nil {
		return nil, err
	}

	var hosts []host
	for _, name := range order {
		table, ok := file.Host[name]
		if !ok {
			continue
		}
		h, err := compileHost(name, dir, table)
		if err != nil {
			return nil, fmt.Errorf("[host.%q]: %w", redacted(name), err)
		}
		hosts = append(hosts, h)
	}

	// The registry itself comes last: `server`, or its own address.
	server := registryHost(registry)
	if file.Server != "" {
		if server, err = compileHost(file.Server, dir, file.hostTable); err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
	} else if err := applyTable(&server, dir, file.hostTable); err != nil {
		return nil, err
	}
	server.isRegistry = true
	return append(hosts, server), nil
}

// describeTOML turns go-toml's errors into one line that names line and key.
func describeTOML(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var keys []string
		for _, e := range strict.Errors {
			line, _ := e.Position()
			keys = append(keys, fmt.Sprintf("unknown key %q in line %d", strings.Join(e.Key(), "."), line))
		}
		return errors.New(strings.Join(keys, ", "))
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		line, _ := decode.Position()
		return fmt.Errorf("line %d: key %q: %s", line, strings.Join(decode.Key(), "."), decode.Error())
	}
	return err
}

// hostOrder lists the names X of [host.X] in the order of the file, which is
// the order to try them in; decoding into a map loses it.
func hostOrder(text []byte) ([]string, error) {
	var order []string
	var parser unstable.Parser
	parser.Reset(text)
	inHost := false // below a [host] table header
	for parser.NextExpression() {
		expr := parser.Expression()
		if expr.Kind != unstable.Table && expr.Kind != unstable.KeyValue {
			continue
		}
		var keys []string
		for it := expr.Key(); it.Next(); {
			keys = append(keys, string(it.Node().Data))
		}
		if expr.Kind == unstable.Table {
			inHost = len(keys) == 1 && keys[0] == "host"
		} else if inHost {
			keys = append([]string{"host"}, keys...)
		}
		if len(keys) >= 2 && keys[0] == "host" && !slices.Contains(order, keys[1]) {
			order = append(order, keys[1])
		}
	}
	return order, parser.Error()
}

// redacted is a configured URL without the password that should not be in it.
func redacted(server string) string {
	u, err := url.Parse(server)
	if err != nil {
		return "(no URL)"
	}
	return u.Redacted()
}

func compileHost(server, dir string, table hostTable) (host, error) {
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil {
		return host{}, errors.New("it is no URL")
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return host{}, fmt.Errorf("%q is not of the form http[s]://host[:port][/path]", u.Redacted())
	}
	h := host{scheme: u.Scheme, addr: u.Host, caps: canPull | canResolve}
	h.prefix = strings.TrimSuffix(path.Clean("/"+u.Path), "/")
	if !table.OverridePath && !strings.HasSuffix(h.prefix, "/v2") {
		h.prefix += "/v2"
	}
	return h, applyTable(&h, dir, table)
}

func applyTable(h *host, dir string, table hostTable) error {
	if table.Capabilities != nil {
		h.caps = 0
		for _, c := range table.Capabilities {
			switch strings.ToLower(c) {
			case "pull":
				h.caps |= canPull
			case "resolve":
				h.caps |= canResolve
			case "push", "referrers": // known to containerd, of no use here
			default:
				return fmt.Errorf("capabilities: unknown value %q", c)
			}
		}
	}
	if table.DialTimeout != "" {
		d, err := time.ParseDuration(table.DialTimeout)
		if err != nil || d <= 0 {
			return fmt.Errorf("dial_timeout: %q is no positive duration", table.DialTimeout)
		}
		h.dialTimeout = d
	}
	for key, value := range table.Header {
		values, err := stringOrList(value)
		if err != nil {
			return fmt.Errorf("header.%s: %w", key, err)
		}
		if h.header == nil {
			h.header = http.Header{}
		}
		h.header[http.CanonicalHeaderKey(key)] = values
	}
	return applyTLS(h, dir, table)
}

func applyTLS(h *host, dir string, table hostTable) error {
	if table.CA == nil && table.Client == nil && !table.SkipVerify {
		return nil
	}
	h.tls = &tls.Config{InsecureSkipVerify: table.SkipVerify} // the administrator's word, see skip_verify in containerd docs/hosts.md
	if table.CA != nil {
		files, err := stringOrList(table.CA)
		if err != nil {
			return fmt.Errorf("ca: %w", err)
		}
		for _, file := range files {
			if err := addCA(h.tls, inDir(dir, file)); err != nil {
				return fmt.Errorf("ca: %w", err)
			}
		}
	}
	pairs, err := clientPairs(table.Client)
	if err != nil {
		return fmt.Errorf("client: %w", err)
	}
	for _, pair := range pairs {
		if err := addClientCert(h.tls, inDir(dir, pair[0]), inDir(dir, pair[1])); err != nil {
			return fmt.Errorf("client: %w", err)
		}
	}
	return nil
}

// dockerCertDir reads a directory without hosts.toml the way Docker does:
// *.crt are authorities, X.cert with X.key client certificates.
func dockerCertDir(dir, registry string) ([]host, error) {
	h := registryHost(registry)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("registry configuration: %w", err)
	}
	for _, entry := range entries {
		if h.tls == nil {
			h.tls = &tls.Config{}
		}
		file := filepath.Join(dir, entry.Name())
		switch filepath.Ext(file) {
		case ".crt":
			err = addCA(h.tls, file)
		case ".cert":
			err = addClientCert(h.tls, file, strings.TrimSuffix(file, ".cert")+".key")
		}
		if err != nil {
			return nil, fmt.Errorf("registry configuration: %w", err)
		}
	}
	return []host{h}, nil
}

func addCA(config *tls.Config, file string) error {
	pem, err := readConfig(file)
	if err != nil {
		return err
	}
	if config.RootCAs == nil {
		if config.RootCAs, err = x509.SystemCertPool(); err != nil {
			config.RootCAs = x509.NewCertPool() // a node without system roots still trusts what is configured
		}
	}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s holds no PEM certificate", file)
	}
	return nil
}

func addClientCert(config *tls.Config, certFile, keyFile string) error {
	cert, err := readConfig(certFile)
	if err != nil {
		return err
	}
	key, err := readConfig(keyFile)
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("%s: %w", certFile, err)
	}
	config.Certificates = append(config.Certificates, pair)
	return nil
}

// clientPairs reads the three forms of `client`. A file alone holds certificate and key.
func clientPairs(value any) ([][2]string, error) {
	switch v := value.(type) {
	case nil:
		return nil, nil
	case string:
		return [][2]string{{v, v}}, nil
	case []any:
		var pairs [][2]string
		for _, element := range v {
			if s, ok := element.(string); ok {
				pairs = append(pairs, [2]string{s, s})
				continue
			}
			files, err := stringOrList(element)
			if err != nil || len(files) != 2 {
				return nil, errors.New("want a file, or a list of files or of [certificate, key] pairs")
			}
			pairs = append(pairs, [2]string{files[0], files[1]})
		}
		return pairs, nil
	}
	return nil, errors.New("want a file, or a list of files or of [certificate, key] pairs")
}

func stringOrList(value any) ([]string, error) {
	switch v := value.(type) {
	case string:
		return []string{v}, nil
	case []any:
		list := make([]string, 0, len(v))
		for _, element := range v {
			s, ok := element.(string)
			if !ok {
				return nil, fmt.Errorf("want a string or a list of strings, got a list with a %T", element)
			}
			list = append(list, s)
		}
		return list, nil
	}
	return nil, fmt.Errorf("want a string or a list of strings, got a %T", value)
}

func inDir(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

func readConfig(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxConfigFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", file, maxConfigFile)
	}
	return text, nil
}
