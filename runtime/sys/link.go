package sys

import "golang.org/x/sys/unix"

// LinkUp sets a network interface of the calling thread's network namespace up, netdevice(7). One that is up already is left
// alone: setting flags waits for whoever else changes any link of the host, looking at them does not.
//
// Needs: CAP_NET_ADMIN in the user namespace that owns the network namespace.
func LinkUp(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return &Error{Op: "socket", Err: err}
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return &Error{Op: "name link", Path: name, Err: err}
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, req); err != nil {
		return &Error{Op: "ioctl SIOCGIFFLAGS", Path: name, Err: err}
	}
	if flags := req.Uint16(); flags&unix.IFF_UP == 0 {
		req.SetUint16(flags | unix.IFF_UP)
		if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
			return &Error{Op: "ioctl SIOCSIFFLAGS", Path: name, Err: err}
		}
	}
	return nil
}
