package sys

import (
	"golang.org/x/sys/unix"
)

// New-style mounts (fsopen(2), Linux 5.2; mount_setattr(2), 5.12). A detached mount is a
// descriptor: closing it undoes everything.

// CreateMount makes a new file system and returns it as a detached mount with
// the MOUNT_ATTR_* flags attr. Options with an empty value are flags.
//
// Needs: CAP_SYS_ADMIN in the user namespace that owns the mount namespace.
func CreateMount(fstype string, options [][2]string, attr uint64) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, wrap("fsopen", fstype, err)
	}
	defer unix.Close(fs)
	for _, o := range options {
		if o[1] == "" {
			err = unix.FsconfigSetFlag(fs, o[0])
		} else {
			err = unix.FsconfigSetString(fs, o[0], o[1])
		}
		if err != nil {
			return -1, explain(fs, "fsconfig", fstype+" "+o[0]+"="+o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, explain(fs, "fsconfig create", fstype, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(attr))
	if err != nil {
		return -1, explain(fs, "fsmount", fstype, err)
	}
	return fd, nil
}

// explain adds what the file system context itself says of a failure: reading
// it gives lines like "e overlay: …" (fsopen(2), message retrieval).
func explain(fs int, op, object string, err error) error {
	buf := make([]byte, 512)
	if n, rerr := unix.Read(fs, buf); rerr == nil && n > 2 {
		for n > 0 && buf[n-1] == '\n' {
			n--
		}
		object += " (" + string(buf[2:n]) + ")"
	}
	return wrap(op, object, err)
}

// CloneMount returns a detached copy of the mount at path (relative to dir; "" is
// dir itself), with all below it if recursive.
func CloneMount(dir int, path string, recursive bool) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	for {
		fd, err := unix.OpenTree(dir, path, flags)
		if err == unix.EINTR {
			continue
		}
		return fd, wrap("open_tree", path, err)
	}
}

// SetMountAttr changes the attributes of the mount fd; see mount_setattr(2).
func SetMountAttr(fd int, recursive bool, attr unix.MountAttr) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	return wrap("mount_setattr", "", unix.MountSetattr(fd, "", flags, &attr))
}

// AttachMount puts the mount fd at target, an O_PATH descriptor.
func AttachMount(fd, target int, path string) error {
	return wrap("move_mount", path, unix.MoveMount(fd, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
}
