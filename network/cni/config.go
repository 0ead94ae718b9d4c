package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/crisp-cri/crisp/network"
)

const (
	// maxConfig bounds a configuration file, and a list with all its plugins, in bytes:
	// it is in every pod's record.
	maxConfig = 256 << 10
	// maxPlugins bounds a list.
	maxPlugins = 64
	// maxProblems bounds how many bad files are named.
	maxProblems = 8
)

// found is what is in the configuration directory at one moment. It is immutable.
type found struct {
	list     *libcni.NetworkConfigList // nil: there is none; its Bytes are the whole of it
	file     string                    // where list is from
	problems []error                   // of files that are ignored, each with its name
}

// same says whether nothing is different.
func (f *found) same(g *found) bool {
	if f.file != g.file || (f.list == nil) != (g.list == nil) || f.list != nil && !bytes.Equal(f.list.Bytes, g.list.Bytes) {
		return false
	}
	return slices.EqualFunc(f.problems, g.problems, func(a, b error) bool { return a.Error() == b.Error() })
}

// loadDir reads the first valid list of dir, in the order of the files' names. A
// directory that does not exist is an empty one.
func loadDir(dir string) *found {
	f := &found{}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.problems = append(f.problems, err)
	}
	for _, e := range entries { // sorted, os.ReadDir
		if !slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(e.Name())) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		list, err := loadFile(path)
		switch {
		case err != nil:
			f.problems = append(f.problems, fmt.Errorf("%s: %w", e.Name(), err))
		case f.list == nil:
			f.list, f.file = list, path
		}
	}
	return f
}

// loadFile reads one list; a file of the older kind, with one plugin, becomes a list of one.
func loadFile(path string) (*libcni.NetworkConfigList, error) {
	text, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if filepath.Ext(path) != ".conflist" {
		if text, err = listOfOne(text); err != nil {
			return nil, err
		}
	}
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return nil, err
	}
	if err := checkList(list); err != nil {
		return nil, err
	}
	if !list.LoadOnlyInlinedPlugins {
		// Since libcni 1.3, plugins may also be dropped into a folder called as the network.
		if list, err = inlined(list, filepath.Join(filepath.Dir(path), list.Name)); err != nil {
			return nil, err
		}
	}
	return list, checkPlugins(list)
}

// parseList is the list of a pod's record.
func parseList(text []byte) (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return nil, err
	}
	return list, errors.Join(checkList(list), checkPlugins(list))
}

// listOfOne is what libcni.ConfListFromConf does.
func listOfOne(text []byte) ([]byte, error) {
	one, err := libcni.NetworkPluginConfFromBytes(text)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"name": one.Network.Name, "cniVersion": one.Network.CNIVersion, "plugins": []json.RawMessage{text}, "loadOnlyInlinedPlugins": true,
	})
}

// inlined is list with the plugins of folder at its end, and in its Bytes.
func inlined(list *libcni.NetworkConfigList, folder string) (*libcni.NetworkConfigList, error) {
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var more []json.RawMessage
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".conf" {
			continue
		}
		text, err := readFile(filepath.Join(folder, e.Name()))
		if err == nil && !json.Valid(text) {
			err = errors.New("no JSON")
		}
		if err != nil {
			return nil, fmt.Errorf("%s/%s: %w", filepath.Base(folder), e.Name(), err)
		}
		more = append(more, text)
	}
	if len(more) == 0 {
		return list, nil
	}
	var whole map[string]json.RawMessage
	if err := json.Unmarshal(list.Bytes, &whole); err != nil {
		return nil, err
	}
	var plugins []json.RawMessage
	if p, ok := whole["plugins"]; ok {
		if err := json.Unmarshal(p, &plugins); err != nil {
			return nil, err
		}
	}
	if whole["plugins"], err = json.Marshal(append(plugins, more...)); err != nil {
		return nil, err
	}
	whole["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	text, err := json.Marshal(whole)
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(text)
}

// checkList checks what becomes part of paths and environment variables.
func checkList(list *libcni.NetworkConfigList) error {
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return fmt.Errorf("%w: %w", network.ErrInvalid, err)
	}
	if list.CNIVersion != "" && !slices.Contains(version.All.SupportedVersions(), list.CNIVersion) {
		return fmt.Errorf("%w: cniVersion %q, supported are %s", network.ErrInvalid, shorten(list.CNIVersion), strings.Join(version.All.SupportedVersions(), ", "))
	}
	return nil
}

// checkPlugins checks the programs that are executed, for IPAM by another plugin.
func checkPlugins(list *libcni.NetworkConfigList) error {
	if len(list.Plugins) == 0 || len(list.Plugins) > maxPlugins {
		return fmt.Errorf("%w: %d plugins, want 1 to %d", network.ErrInvalid, len(list.Plugins), maxPlugins)
	}
	if len(list.Bytes) > maxConfig {
		return fmt.Errorf("%w: more than %d bytes", network.ErrInvalid, maxConfig)
	}
	for _, p := range list.Plugins {
		if err := checkType(p.Network.Type); err != nil {
			return err
		}
		if ipam := p.Network.IPAM.Type; ipam != "" {
			if err := checkType(ipam); err != nil {
				return fmt.Errorf("ipam: %w", err)
			}
		}
	}
	return nil
}

// readFile reads a configuration file. A symbolic link is followed, as tools that install
// configurations use them; a pipe does not block it.
func readFile(path string) (_ []byte, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	defer f.Close() // only read
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(errors.New("no regular file"), err)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(text) > maxConfig {
		err = fmt.Errorf("more than %d bytes", maxConfig)
	}
	return text, err
}
